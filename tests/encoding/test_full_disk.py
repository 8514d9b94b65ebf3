"""A full disk: an error with path and space, nothing lost, and identical bytes once there is room."""

import errno
import os
from pathlib import Path

import pytest

from llara.encoding.shards import Vectors
from llara.errors import StorageError
from tests.encoding.crash import Finished
from tests.encoding.helpers import FakeEncoder, corpus_lines, run, tree, write_corpus
from tests.encoding.small_disk import PAGE, SmallDisk, least_pages, names_path_and_space, sizes_below

ROOM = 400  # pages; more than the whole job takes
SIZES = 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("full") / "corpus.jsonl", corpus_lines(60))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> dict[str, str]:
    run(corpus, corpus.parent / "undisturbed", shard_size=20)
    return tree(corpus.parent / "undisturbed")


def fails(corpus: Path, disk: SmallDisk, pages: int) -> str:
    """Runs on a fresh disk of this size; returns the message, empty where the run succeeded. Leaves it mounted."""
    disk.mount(pages)
    try:
        run(corpus, disk.output, shard_size=20)
    except StorageError as error:
        return str(error)
    return ""


def continues(corpus: Path, disk: SmallDisk, undisturbed: dict[str, str]) -> None:
    """Makes room and goes on: finished shards are kept, and the bytes are those of an undisturbed run."""
    finished, encoder = Finished(disk.output), FakeEncoder()
    disk.resize(ROOM)
    summary = run(corpus, disk.output, shard_size=20, encode=encoder)
    assert not finished.fault(summary.reused_shards, undisturbed)
    assert len(encoder.calls) == 3 - len(finished.shards)


def test_disks_of_every_size_up_to_one_page_short(corpus: Path, disk: SmallDisk, undisturbed: dict[str, str]) -> None:
    assert not fails(corpus, disk, ROOM)
    least = least_pages(lambda pages: not fails(corpus, disk, pages), ROOM)
    sizes = sizes_below(least, SIZES)
    assert (len(sizes), sizes[-1]) == (SIZES, least - 1)
    for pages in sizes:
        message = fails(corpus, disk, pages)
        assert names_path_and_space(message, disk.path), f"{pages} of {least} pages: {message}"
        assert not list(disk.output.glob(".tmp-*"))
        continues(corpus, disk, undisturbed)


def test_a_folder_being_read_is_no_victim_of_a_full_disk(corpus: Path, disk: SmallDisk) -> None:
    assert not fails(corpus, disk, ROOM)
    vectors = Vectors.open(disk.output)
    shards = list(vectors.shards())
    before = [shard.copy() for shard in shards]
    used = sum(path.stat().st_blocks * 512 for path in disk.output.iterdir())
    disk.resize(used // PAGE + 2)
    grown = write_corpus(corpus.with_name("grown.jsonl"), corpus_lines(90))
    with pytest.raises(StorageError, match="needs"):
        run(grown, disk.output, shard_size=20)
    assert all((old == new).all() for old, new in zip(before, shards, strict=True))
    assert len(list(vectors.documents.iter_documents())) == 60
    disk.resize(ROOM)
    assert run(grown, disk.output, shard_size=20) == (5, 90, 0, 3)


@pytest.mark.parametrize("at", [1, 2, 3, 9, 17])
def test_a_disk_that_fills_up_at_one_reservation(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    left = at

    def reserve(descriptor: int, offset: int, size: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    with pytest.raises(StorageError, match=r"needs [\d,]+ bytes, [\d,]+ are free: make room"):
        run(corpus, tmp_path / "vectors", shard_size=20)
    monkeypatch.undo()
    run(corpus, tmp_path / "vectors", shard_size=20)
    assert tree(tmp_path / "vectors") == undisturbed


def test_a_shard_that_cannot_be_kept_is_not_encoded(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llara.encoding.numbers.free_bytes", lambda folder: 100)
    encoder = FakeEncoder()
    with pytest.raises(StorageError, match=r"the next shard needs [\d,]+ bytes, 100 are free"):
        run(corpus, tmp_path / "vectors", encode=encoder)
    assert encoder.calls == []
