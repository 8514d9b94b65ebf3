"""Cut and flipped files of every type of index: an error that names the file, never a signal, never a wrong one."""

from pathlib import Path

import pytest

from llara.errors import StorageError
from llara.index.opening import open_index
from tests.damage import KINDS, bit_flips, complaint, cut_offsets, files_of, flipped, index_types, make_sources

CUTS, EDGE, FLIPS = 3, 2, 5  # per file; benchmarks/corruption.py tries many more
TYPES = index_types()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module", params=[*TYPES, "passages"])
def index(request: pytest.FixtureRequest, sources: Path) -> Path:
    return KINDS[request.param].make(sources)


def test_every_type_is_covered() -> None:
    assert {"flat", "sparse", "bm25"} <= set(TYPES) < set(KINDS)


def test_a_sound_index_reads_and_verifies(index: Path) -> None:
    KINDS[index.name].read(index, True)
    KINDS[index.name].verify(index)


def test_a_file_cut_anywhere_is_named(index: Path) -> None:
    for path in [index / name for name in files_of(index)]:
        good = path.read_bytes()
        for offset in cut_offsets(len(good), path.name, CUTS, EDGE):
            message = complaint(path, good[:offset], lambda: KINDS[index.name].read(index, False))
            assert message.startswith(f"{path}: "), f"cut at {offset} of {len(good)}: {message}"


def test_every_flipped_bit_is_found_and_none_is_a_crash(index: Path) -> None:
    kind = KINDS[index.name]
    for path in [index / name for name in files_of(index)]:
        good = path.read_bytes()
        for place in bit_flips(len(good), path.name, FLIPS):
            complaint(path, flipped(good, place), lambda: kind.read(index, False))
            assert complaint(path, flipped(good, place), lambda: kind.read(index, True)), f"{path.name}, bit {place}"
            assert complaint(path, flipped(good, place), lambda: kind.verify(index)), f"{path.name}, bit {place}"


def test_documents_of_its_own_that_are_missing_are_named(sources: Path) -> None:
    index = KINDS["bm25"].make(sources)
    gone = (index / "documents" / "shard-00000.docs").rename(sources / "gone")
    with pytest.raises(StorageError, match=r"shard-00000\.docs: is missing"):
        open_index(index)
    gone.rename(index / "documents" / "shard-00000.docs")
    open_index(index)
