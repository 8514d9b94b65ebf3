"""A model folder: what is saved comes back, and what was changed since, or is incomplete, is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llara.config import ModelConfig
from llara.contract import Contract, digest, make_record
from llara.errors import ModelError, StorageError
from llara.files import write_json_atomic
from llara.loading import load_model
from llara.templates import PAPER, RELEASE
from tests import tiny
from tests.folders import TEXTS, flip, load, save_model

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("loading") / "saved")


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A model folder with its contract, to be damaged."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


@pytest.fixture(scope="session")
def base_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("loading") / "base")


@pytest.fixture
def base(base_once: Path, tmp_path: Path) -> Path:
    """A base model folder, without `llara.json`."""
    return Path(shutil.copytree(base_once, tmp_path / "base"))


def reseal(folder: Path, edit: Edit | None = None) -> None:
    """Makes checksums and digest of `llara.json` fit the files again: only the probe can then find a change."""
    path = folder / "llara.json"
    record = json.loads(path.read_text())
    if edit is not None:
        edit(record)
    fresh = make_record(folder, Contract(), {})
    record["files"] = fresh["files"]
    del record["digest"]
    write_json_atomic(path, {**record, "digest": digest(record)})


# Saved, and loaded back


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_saved_model_loads_bit_identically(family: str, tmp_path: Path) -> None:
    model = tiny.model(family, contract=Contract(template=PAPER, bos=True, title_separator=": ", query_length=50))
    model.save(tmp_path / "out" / "model", {"training.json": "{}"})
    again = load(tmp_path / "out" / "model", verify=True)
    assert again.contract == model.contract
    assert again.has_head
    assert again.new_tokens == []
    before, after = model.lm.state_dict(), again.lm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model.encode(TEXTS, "passage"), again.encode(TEXTS, "passage"))
    assert not again.lm.training
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_saved_twice_is_the_same_folder(saved: Path, tmp_path: Path) -> None:
    load(saved).save(tmp_path / "again")
    names = sorted(path.name for path in saved.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert (saved / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert load(saved).fingerprint == load(saved).fingerprint


def test_added_slot_tokens_come_back(base: Path, tmp_path: Path) -> None:
    model = load_model(ModelConfig(model=str(base), template="release"), for_training=True)
    assert len(model.new_tokens) == 16
    model.save(tmp_path / "release")
    again = load(tmp_path / "release")
    assert again.contract.template == RELEASE
    assert again.bind().passage.suffix[-8:] == tuple(model.new_tokens[:8])
    assert torch.equal(model.encode(TEXTS, "query"), again.encode(TEXTS, "query"))


def test_added_eos_comes_back(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base", words=tiny.tokenizer(eos=False))
    model = load_model(ModelConfig(model=str(folder)), for_training=True)
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.tokenizer.eos_token == "</s>"
    assert again.bind().query.suffix[-1] == model.new_tokens[0]
    assert torch.equal(model.encode(TEXTS, "query"), again.encode(TEXTS, "query"))


def test_loads_in_another_dtype_within_its_tolerance(saved: Path) -> None:
    model = load(saved, dtype="bfloat16")
    assert next(model.lm.parameters()).dtype == torch.bfloat16
    assert load(saved).encode(TEXTS, "query").sub(model.encode(TEXTS, "query")).abs().max() < 0.05


def test_an_existing_folder_is_not_overwritten(saved: Path) -> None:
    with pytest.raises(StorageError, match=r"exists already and is not empty"):
        tiny.model("llama").save(saved)
    load(saved, verify=True)


# A folder that was changed


def swap_tokens(folder: Path) -> None:
    """Gives two letters each other's ids, in a file of the same size."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["i"] = vocabulary["i"], vocabulary["e"]
    path.write_text(json.dumps(tokenizer))


def test_changed_tokenizer_is_found_by_its_checksum(saved: Path) -> None:
    swap_tokens(saved)
    with pytest.raises(StorageError, match=r"tokenizer\.json: is damaged"):
        load(saved)


def test_changed_tokenizer_is_found_by_the_probe(saved: Path) -> None:
    swap_tokens(saved)
    reseal(saved)
    message = (
        r"saved: the tokenizer is not the one the model was saved with: token \d+ was \d+ when saved and is \d+ now"
    )
    with pytest.raises(ModelError, match=message):
        load(saved)


def test_changed_contract_is_found_by_its_digest(saved: Path) -> None:
    path = saved / "llara.json"
    path.write_text(path.read_text().replace('"query_length": 40', '"query_length": 41'))
    with pytest.raises(ModelError, match=r"llara\.json: was changed after it was saved"):
        load(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record["contract"].update(bos=False), r"token 0 was 0 when saved and is \d+ now"),
        (lambda record: record["contract"].update(query_length=20), r"token \d+ was \d+ when saved and is \d+ now"),
        (
            lambda record: record["contract"]["template"]["passage"].update(suffix=" the original sentence: "),
            r"token \d+ was \d+ when saved and is \d+ now",
        ),
        (lambda record: record["contract"].update(normalise=False), r"the weights do not give the vectors they gave"),
    ],
    ids=["bos", "length", "template", "normalise"],
)
def test_changed_contract_is_found_by_the_probe(saved: Path, edit: Edit, message: str) -> None:
    reseal(saved, edit)
    with pytest.raises(ModelError, match=message):
        load(saved)


def test_weights_whose_change_matters_fail_the_probe(saved: Path) -> None:
    size = (saved / "model.safetensors").stat().st_size
    flip(saved / "model.safetensors", "model.norm.weight", 26)  # in the exponent
    assert (saved / "model.safetensors").stat().st_size == size
    message = r"saved: the weights do not give the vectors they gave when saved: largest difference .*, allowed 0\.0002"
    with pytest.raises(ModelError, match=message):
        load(saved)


def test_weights_that_are_not_finite_fail_the_probe(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"largest difference nan"):
        load(saved)


def test_verify_finds_a_change_that_the_probe_cannot(saved: Path) -> None:
    flip(saved / "model.safetensors", "model.norm.weight", 0)  # the last bit
    load(saved)
    with pytest.raises(StorageError, match=r"model\.safetensors: is damaged: its SHA-256 is not the one recorded"):
        load(saved, verify=True)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_verify_finds_any_changed_byte_of_any_file(saved: Path, share: float) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        path = saved / name
        original = path.read_bytes()
        content = bytearray(original)
        content[int(share * (len(content) - 1))] ^= 4
        path.write_bytes(content)
        with pytest.raises(StorageError, match=rf"{name}: is damaged"):
            load(saved, verify=True)
        path.write_bytes(original)
    load(saved, verify=True)


def test_truncated_weights(saved: Path, base: Path) -> None:
    for folder, message in ((saved, r"is damaged: has .* bytes where"), (base, r"base: cannot be loaded as a causal")):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises((StorageError, ModelError), match=message):
            load(folder)


def test_record_of_another_version(saved: Path) -> None:
    reseal(saved, lambda record: record.update(version=9))
    with pytest.raises(ModelError, match=r"llara\.json: version 9; this llara reads version 1"):
        load(saved)


def test_stranger_file(saved: Path) -> None:
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds files that were not saved with the model: adapter_config\.json"):
        load(saved)


# A folder that is incomplete


def test_missing_config(saved: Path, base: Path) -> None:
    for folder in (saved, base):
        (folder / "config.json").unlink()
        with pytest.raises(ModelError, match=rf"{folder.name}: holds no model \(config\.json is missing\)"):
            load(folder)


def test_missing_tokenizer(saved: Path, base: Path) -> None:
    (saved / "tokenizer.json").unlink()
    with pytest.raises(StorageError, match=r"saved/tokenizer\.json: is missing"):
        load(saved)
    (base / "tokenizer.json").unlink()
    with pytest.raises(
        ModelError, match=r"base: has no tokenizer \(tokenizer\.json is missing\); copy it from the base"
    ):
        load(base)


@pytest.mark.parametrize("content", ["", '{"model": ', "[]", '{"added_tokens": [], "model": {"type": "None such"}}'])
def test_broken_tokenizer(base: Path, content: str) -> None:
    (base / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"base: its tokenizer cannot be read: "):
        load(base)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"model_type": ',
        "[]",
        "{}",
        '{"model_type": "no-such-model"}',
        '{"model_type": "llama", "hidden_size": "many"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
    ],
)
def test_broken_config(base: Path, content: str) -> None:
    (base / "config.json").write_text(content)
    with pytest.raises(
        ModelError, match=r"base: (cannot be loaded as a causal language model|its tokenizer cannot be)"
    ):
        load(base)


def test_missing_weights(saved: Path, base: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"model\.safetensors: is missing"):
        load(saved)
    (base / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"base: holds no \.safetensors weights \(others: none\); pickled weights are not"
    ):
        load(base)


def test_pickled_weights_are_refused(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    message = r"base: holds no \.safetensors weights \(others: pytorch_model\.bin\); pickled weights are not read"
    with pytest.raises(ModelError, match=message):
        load(base)


def test_pickled_weights_are_not_read_beside_other_safetensors(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").rename(base / "other.safetensors")
    with pytest.raises(ModelError, match=r"base: cannot be loaded as a causal language model: .*model\.safetensors"):
        load(base)


def test_weights_of_another_model(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    short = {name: value for name, value in tensors.items() if "layers.1.mlp" not in name}
    save_file(short, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"weights are missing or of the wrong shape: model\.layers\.1\.mlp\.down_proj"
    ):
        load(base)
    save_file({**tensors, "model.norm.weight": torch.ones(7)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"base: .*(wrong shape|mismatch)"):
        load(base)


def test_model_without_a_head_loads_and_says_so(base: Path) -> None:
    path = base / "model.safetensors"
    save_file(
        {name: value for name, value in load_file(path).items() if name != "lm_head.weight"},
        path,
        metadata={"format": "pt"},
    )
    assert not load(base).has_head
