import json
from pathlib import Path
from typing import Any

import pytest

from llara.contract import (
    Contract,
    check_files,
    describe_difference,
    digest,
    folder_files,
    make_record,
    read_record,
)
from llara.errors import ModelError, StorageError
from llara.files import write_json_atomic
from llara.templates import RELEASE


def test_round_trip_through_json() -> None:
    contract = Contract(template=RELEASE, bos=True, title_separator=None, query_length=1, passage_length=2)
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict())), "x") == contract


def test_lengths_per_side() -> None:
    contract = Contract(query_length=7, passage_length=9)
    assert (contract.length("query"), contract.length("passage")) == (7, 9)


@pytest.mark.parametrize(
    ("title", "separator", "joined"),
    [("T", " ", "T x"), ("", " ", "x"), ("T", None, "x"), ("T", "\n", "T\nx"), ("T", "", "Tx")],
)
def test_title_joining(title: str, separator: str | None, joined: str) -> None:
    assert Contract(title_separator=separator).join_title(title, "x") == joined
    assert Contract(title_separator=separator).join_title(title, "") == title


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, r"llara\.json: pooling 'max', causal True: not supported"),
        ({"causal": False}, r"llara\.json: pooling 'mean_of_slots', causal False: not supported"),
        ({"colour": 1}, r"llara\.json: the contract's fields do not fit this version of llara: colour"),
        ({"bos": ...}, r"llara\.json: the contract's fields do not fit this version of llara: bos"),
    ],
)
def test_contract_that_this_version_cannot_keep(changes: dict[str, Any], message: str) -> None:
    values = {**Contract().to_dict(), **changes}
    with pytest.raises(ModelError, match=message):
        Contract.from_dict({key: value for key, value in values.items() if value is not ...}, "llara.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "model.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "README.md").write_text("about")
    write(tmp_path, make_record(tmp_path, Contract(), {"dtype": "float32", "entries": []}))
    return tmp_path


def write(folder: Path, record: dict[str, Any]) -> None:
    write_json_atomic(folder / "llara.json", record)


def resealed(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changed = {**record, **changes}
    return {**changed, "digest": digest({key: value for key, value in changed.items() if key != "digest"})}


def test_record_of_an_untouched_folder(folder: Path) -> None:
    record = read_record(folder)
    assert record is not None
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(record["files"]) == folder_files(folder) == names
    assert check_files(folder, record, full=False) == 5 + 2 + 8
    assert check_files(folder, record, full=True) == 5 + 2 + 8 + 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe": "x"}, "probe is no dict"),
        ({"probe": {"dtype": "int8", "entries": []}}, "probe is no list of texts"),
        ({"probe": {"dtype": "float32", "entries": [{"side": "query"}]}}, "probe is no list of texts"),
        ({"files": []}, "files is no dict"),
        ({"files": {"config.json": 2}}, "files.config.json has no size"),
        ({"has_head": 1}, "has_head is no bool"),
        ({"contract": {**Contract().to_dict(), "query_length": "64"}}, "contract.query_length is no length"),
        ({"contract": {**Contract().to_dict(), "template": None}}, "contract.template is no object"),
    ],
)
def test_record_of_another_form_is_refused_although_its_digest_is_right(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    record = read_record(folder)
    assert record is not None
    write(folder, resealed(record, **changes))
    with pytest.raises(ModelError, match=message):
        read_record(folder)


@pytest.mark.parametrize("name", ["../config.json", "/dev/zero", "a/b.json", ".."])
def test_record_that_names_files_elsewhere(folder: Path, name: str) -> None:
    record = read_record(folder)
    assert record is not None
    write(folder, resealed(record, files={name: {"bytes": 0, "sha256": ""}}))
    found = read_record(folder)
    assert found is not None
    with pytest.raises(StorageError, match="which is no file name"):
        check_files(folder, found, full=False)


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_folder_without_a_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None


def test_any_edit_of_the_record_is_found(folder: Path) -> None:
    record = read_record(folder)
    assert record is not None
    edits: list[dict[str, Any]] = [
        {"contract": {**record["contract"], "title_separator": None}},
        {"contract": {**record["contract"], "query_length": 65}},
        {"probe": {"dtype": "bfloat16", "entries": []}},
        {"files": {}},
        {"extra": 1},
        {"digest": None},
    ]
    for edit in edits:
        write(folder, {**record, **edit})
        with pytest.raises(ModelError, match=r"llara\.json: was changed after it was saved\. The contract belongs"):
            read_record(folder)


def test_record_of_another_version_or_format(folder: Path) -> None:
    record = read_record(folder)
    assert record is not None
    write(folder, resealed(record, version=2))
    with pytest.raises(ModelError, match=r"llara\.json: version 2; this llara reads version 1"):
        read_record(folder)
    write(folder, resealed(record, format="other"))
    with pytest.raises(ModelError, match=r"llara\.json: is no llara model record"):
        read_record(folder)
    (folder / "llara.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"llara\.json: is no llara model record"):
        read_record(folder)
    (folder / "llara.json").write_text('{"format": ')
    with pytest.raises(StorageError, match=r"llara\.json: is damaged: not valid JSON"):
        read_record(folder)


def check(folder: Path, *, full: bool) -> None:
    record = read_record(folder)
    assert record is not None
    check_files(folder, record, full=full)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_and_resized_files_are_found(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(StorageError, match=rf"{name}: is damaged: has .* bytes where .* were written"):
        check(folder, full=False)
    (folder / name).unlink()
    with pytest.raises(StorageError, match=rf"{name}: is missing"):
        check(folder, full=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_changed_small_files_are_found_at_every_load(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[0] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(StorageError, match=rf"{name}: is damaged: its SHA-256 is not the one recorded"):
        check(folder, full=False)


@pytest.mark.parametrize("position", [0, 57, 199])
def test_any_changed_byte_of_the_weights_is_found_by_a_full_check(folder: Path, position: int) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[position] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    check(folder, full=False)
    with pytest.raises(StorageError, match=r"model\.safetensors: is damaged: its SHA-256 is not the one recorded"):
        check(folder, full=True)


def test_any_changed_byte_of_the_record_is_found_by_a_full_check(folder: Path) -> None:
    path = folder / "llara.json"
    original = path.read_bytes()
    for position in range(len(original)):
        content = bytearray(original)
        content[position] = ord("\t") if chr(content[position]).isspace() else content[position] ^ 1
        path.write_bytes(content)
        with pytest.raises((ModelError, StorageError), match=r"llara\.json: "):
            check(folder, full=True)
    path.write_bytes(original)
    check(folder, full=True)


@pytest.mark.parametrize("name", ["added_tokens.json", "adapter_config.json", "extra.safetensors", "vocab.txt"])
def test_stranger_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"holds files that were not saved with the model: {name}"):
        check(folder, full=False)


def test_files_that_loading_never_reads_are_no_strangers(folder: Path) -> None:
    for name in ("NOTES.md", "log.jsonl", "picture.png"):
        (folder / name).write_text("{}")
    check(folder, full=True)


def test_describe_difference() -> None:
    assert describe_difference([1, 2, 3], [1, 9, 3]) == "token 1 was 2 when saved and is 9 now"
    assert describe_difference([1, 2], [1, 2, 3]) == "2 tokens when saved, 3 now"
