"""Cut and flipped files: an error that names the file, never a signal, never a traceback of ours."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.encoding.manifest import TERMS, read_sealed, write_sealed
from llara.encoding.shards import Vectors, verify_vectors
from llara.errors import StorageError
from tests.damage import KINDS, bit_flips, complaint, cut_offsets, flipped, make_sources
from tests.encoding.helpers import VOCABULARY

CUTS, EDGE, FLIPS = 16, 2, 40  # per file; benchmarks/corruption.py tries many more
FILES = ["config.toml", "manifest.json", "rejected.jsonl"] + [
    f"shard-00000.{suffix}"
    for suffix in (
        *("docs", "docs.npy", "ids", "ids.npy", "json", "lookup.npy", "npy"),
        *("terms.starts.npy", "terms.ids.npy", "terms.weights.npy"),
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("damage")) / "vectors"


def damaged(path: Path, content: bytes, verify: bool) -> str:
    return complaint(path, content, lambda: KINDS["vectors"].read(path.parent, verify))


def test_the_list_of_files_is_whole(folder: Path) -> None:
    assert {path.name for path in folder.iterdir() if not path.name.startswith("shard-00001")} == set(FILES)
    KINDS["vectors"].read(folder, True)
    assert verify_vectors(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_named(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    offsets = cut_offsets(len(good), name, CUTS, EDGE)
    assert len(offsets) == min(CUTS + 2 * EDGE, len(good))
    for offset in offsets:
        message = damaged(folder / name, good[:offset], verify=False)
        assert message.startswith(f"{folder / name}: is damaged"), f"cut at {offset} of {len(good)}: {message}"
    assert "is damaged" in damaged(folder / name, good + b"\x00", verify=False)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_and_none_is_a_crash(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    ends = [(0, 0), (1, 7), (len(good) - 1, 3)]
    for place in [*ends, *bit_flips(len(good), name, FLIPS)]:
        damaged(folder / name, flipped(good, place), verify=False)
        message = damaged(folder / name, flipped(good, place), verify=True)
        assert message.startswith(f"{folder / name}: "), f"bit {place}"


def test_changes_that_leave_the_json_value_alone_are_found_too(folder: Path) -> None:
    for name in ("manifest.json", "shard-00000.json"):
        spaced = (folder / name).read_bytes().replace(b"\n", b" ", 1)
        assert "does not fit the checksum in it" in damaged(folder / name, spaced, verify=False)


def test_damaged_text_is_never_handed_out(folder: Path) -> None:
    path = folder / "shard-00000.docs"
    message = damaged(path, flipped(path.read_bytes(), (100, 3)), verify=False)
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
    path = folder / f"shard-00000.{TERMS[part]}"
    kind = np.dtype({"starts": "int64", "ids": "int32", "weights": "float32"}[part])
    good, size = path.read_bytes(), kind.itemsize
    changed = good[: -2 * size] + np.array([number], kind).tobytes() + good[-size:]
    message = damaged(path, changed, verify=False)
    assert message.startswith(f"{path}: is damaged: holds numbers that no encoder wrote")


def test_verifying_lists_every_damaged_file(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in ("shard-00000.npy", "shard-00001.docs", "config.toml"):
        (copy / name).write_bytes(flipped((copy / name).read_bytes(), (5, 1)))
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
