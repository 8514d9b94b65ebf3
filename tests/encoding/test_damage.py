"""Cut and flipped files: an error that names the file, never a signal, never a traceback of ours."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.encoding.manifest import TERMS, read_sealed, write_sealed
from llara.encoding.shards import Vectors, verify_vectors
from llara.errors import StorageError
from llara.terms import Terms
from tests.encoding.helpers import VOCABULARY, corpus_lines, run_sparse, write_corpus

FLIPS = 40  # per file
FILES = ["config.toml", "manifest.json", "rejected.jsonl"] + [
    f"shard-00000.{suffix}"
    for suffix in (
        *("docs", "docs.npy", "ids", "ids.npy", "json", "lookup.npy", "npy"),
        *("terms.starts.npy", "terms.ids.npy", "terms.weights.npy"),
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("damage")
    rows = corpus_lines(90)
    rows[3] = b"bad"
    run_sparse(write_corpus(base / "corpus.jsonl", rows), base / "vectors", shard_size=45)
    return base / "vectors"


def read_all(folder: Path, verify: bool) -> None:
    vectors = Vectors.open(folder, verify=verify)
    for shard in vectors.shards():
        shard.sum()
    for terms in vectors.terms():
        Terms.join([terms.part(row, row + 1) for row in range(len(terms))])
    for position, document in enumerate(vectors.documents.iter_documents()):
        vectors.documents.find(document.id)
        assert vectors.documents.get(position) == document
    vectors.documents.ids()


def damaged(path: Path, change: Callable[[bytes], bytes], verify: bool) -> str:
    """Returns the message that reading a folder with one changed file gives, empty where nothing was noticed."""
    good = path.read_bytes()
    try:
        # A new file, as a copy from elsewhere would be; the old one may still be mapped.
        path.unlink()
        path.write_bytes(change(good))
        read_all(path.parent, verify)
    except StorageError as error:
        return str(error)
    finally:
        path.unlink()
        path.write_bytes(good)
    return ""


def flip(position: int, bit: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        return bytes(changed)

    return change


def test_the_list_of_files_is_whole(folder: Path) -> None:
    assert {path.name for path in folder.iterdir() if not path.name.startswith("shard-00001")} == set(FILES)
    read_all(folder, verify=True)
    assert verify_vectors(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_named(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    random_offsets = random.Random(name).sample(range(size), min(size, 20))
    for offset in sorted({0, 1, size // 2, size - 2, size - 1, *random_offsets}):
        message = damaged(folder / name, lambda content, end=offset: content[:end], verify=False)  # type: ignore[misc]
        assert message.startswith(f"{folder / name}: is damaged"), f"cut at {offset} of {size}: {message}"
    assert "is damaged" in damaged(folder / name, lambda content: content + b"\x00", verify=False)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_and_none_is_a_crash(folder: Path, name: str) -> None:
    seeded, size = random.Random(name), (folder / name).stat().st_size
    offsets = [0, 1, size - 1, *(seeded.randrange(size) for _ in range(FLIPS))]
    for offset in offsets:
        change = flip(offset, seeded.randrange(8))
        damaged(folder / name, change, verify=False)
        assert damaged(folder / name, change, verify=True).startswith(f"{folder / name}: "), f"offset {offset}"


def test_changes_that_leave_the_json_value_alone_are_found_too(folder: Path) -> None:
    for name in ("manifest.json", "shard-00000.json"):
        spaced = damaged(folder / name, lambda content: content.replace(b"\n", b" ", 1), verify=False)
        assert "does not fit the checksum in it" in spaced


def test_damaged_text_is_never_handed_out(folder: Path) -> None:
    message = damaged(folder / "shard-00000.docs", flip(100, 3), verify=False)
    assert "shard-00000.docs: is damaged: block 0 does not fit its checksum" in message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).unlink()
    with pytest.raises(StorageError) as caught:
        Vectors.open(copy)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("part", "number"),
    [("starts", 2**40), ("starts", -1), ("ids", VOCABULARY), ("ids", -1), ("weights", np.nan), ("weights", 0.0)],
)
def test_numbers_that_no_encoder_wrote_are_never_handed_out(folder: Path, part: str, number: float) -> None:
    name = TERMS[part]
    size = np.dtype("int64" if part == "starts" else "int32").itemsize

    def change(content: bytes) -> bytes:
        kind = {"starts": np.int64, "ids": np.int32, "weights": np.float32}[part]
        return content[: -2 * size] + np.array([number], kind).tobytes() + content[-size:]

    message = damaged(folder / f"shard-00000.{name}", change, verify=False)
    assert message.startswith(f"{folder / 'shard-00000'}.{name}: is damaged: holds numbers that no encoder wrote")


def test_verifying_lists_every_damaged_file(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in ("shard-00000.npy", "shard-00001.docs", "config.toml"):
        (copy / name).write_bytes(flip(5, 1)((copy / name).read_bytes()))
    (copy / "shard-00001.ids").unlink()
    problems = verify_vectors(copy)
    for name in ("shard-00000.npy", "shard-00001.docs", "config.toml", "shard-00001.ids"):
        assert sum(name in problem.split(":")[0] for problem in problems) == 1
    assert len(problems) == 4
    (copy / "manifest.json").unlink()
    assert len(verify_vectors(copy)) == 1


def test_a_sidecar_of_another_run_is_not_taken(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copy(copy / "shard-00001.json", copy / "shard-00000.json")
    with pytest.raises(StorageError, match=r"shard-00000\.json: is damaged: belongs to shard-00001"):
        Vectors.open(copy)


def outside_file(manifest: dict[str, Any]) -> None:
    manifest["files"]["../stranger"] = {"bytes": 1, "sha256": ""}


def outside_shard(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["name"] = "../vectors/shard-00000"


@pytest.mark.parametrize("craft", [outside_file, outside_shard])
def test_a_manifest_that_leads_elsewhere_is_refused(
    folder: Path, tmp_path: Path, craft: Callable[[dict[str, Any]], None]
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "vectors"))
    content = read_sealed(copy / "manifest.json")
    craft(content)
    write_sealed(copy / "manifest.json", content)
    with pytest.raises(StorageError, match="which is no file name"):
        Vectors.open(copy)


def test_a_sidecar_that_leads_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "vectors"))
    sidecar = read_sealed(copy / "shard-00000.json")
    sidecar["files"]["x/../../stranger"] = {"bytes": 1, "sha256": ""}
    manifest = read_sealed(copy / "manifest.json")
    manifest["shards"][0]["digest"] = write_sealed(copy / "shard-00000.json", sidecar)
    write_sealed(copy / "manifest.json", manifest)
    with pytest.raises(StorageError, match="which is no file name"):
        Vectors.open(copy)
