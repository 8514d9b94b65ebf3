"""A full disk while an index of any type is built: an error with path and space, and the same bytes with room."""

from pathlib import Path
from typing import Any

import pytest

from llara.config import IndexConfig
from llara.errors import StorageError
from llara.index.build import build_index
from tests.damage import index_types, make_sources
from tests.encoding.helpers import tree
from tests.encoding.small_disk import SmallDisk, least_pages, names_path_and_space, sizes_below

ROOM = 2_000  # pages; more than any index here takes
SIZES = 6  # benchmarks/full_disk.py tries more


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("kind", index_types())
def test_an_index_on_disks_up_to_one_page_short(kind: str, sources: Path, disk: SmallDisk) -> None:
    source: Any = {"corpus": (sources / "corpus.jsonl",)} if kind == "bm25" else {"vectors": sources / "vectors"}
    config = IndexConfig(**source, type=kind, output=disk.output)  # type: ignore[arg-type]

    def fails(pages: int) -> str:
        disk.mount(pages)
        try:
            build_index(config)
        except StorageError as error:
            return str(error)
        return ""

    assert not fails(ROOM)
    expected = tree(disk.output)
    least = least_pages(lambda pages: not fails(pages), ROOM)
    for pages in sizes_below(least, SIZES):
        message = fails(pages)
        assert names_path_and_space(message, disk.path), f"{pages} of {least} pages: {message}"
        disk.resize(ROOM)
        build_index(config)
        assert tree(disk.output) == expected
