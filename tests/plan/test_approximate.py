"""Parts and files of approximate indexes as plans count them, beside those that are built."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.config import IndexConfig
from llara.index import build
from llara.index.build import build_index
from llara.index.flat import FILE
from llara.index.shape import VECTORS, Shape
from llara.plan import approximate, index
from llara.plan.approximate import Speeds, file_bytes, part_seconds, search_memory, vector_bytes
from llara.plan.config import PlanIndexConfig
from llara.plan.jobs import plan_index
from llara.plan.report import Estimate
from tests.index.helpers import make_faiss
from tests.index.test_build import write_corpus
from tests.index.test_change import write_folder

NOTHING = Speeds(0, 0, 0, 0, 0, 0, 0, 0)


def shape(rows: int, dim: int = 64, **settings: Any) -> Shape:
    return Shape.of(IndexConfig(vectors=Path("v"), output=Path("i"), **settings), rows, dim)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"type": "hnsw", "hnsw_m": 4}, 0.01),  # levels are drawn
        ({"type": "ivfpq", "nlist": 5}, 0.0),
        ({"type": "ivfpq", "nlist": 1, "pq_bits": 4}, 0.0),
        ({"type": "ivfpq", "nlist": 5, "pq_bits": 4}, 0.1),  # how full the last blocks of lists are
        ({"type": "rabitq", "nlist": 1}, 0.0),
        ({"type": "rabitq", "nlist": 5, "rabitq_bits": 3}, 0.1),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_have_the_size_that_a_plan_counts(
    settings: dict[str, Any], allowed: float, dtype: str, tmp_path: Path
) -> None:
    vectors = np.random.default_rng(0).standard_normal((500, 64)).astype(dtype)
    given = dict(settings)
    make_faiss(tmp_path, vectors, [f"d{n}" for n in range(500)], given.pop("type"), **given)
    planned = shape(500, **settings)
    size = (tmp_path / FILE).stat().st_size
    assert file_bytes(planned, 500) == pytest.approx(size, rel=allowed, abs=100)
    if planned.has_lists:
        assert vector_bytes(planned, 500, dtype) == (tmp_path / VECTORS).stat().st_size


def of_vectors(folder: Path, documents: int) -> Path:
    """Vectors of dimension 8, in shards of 10 documents."""
    return write_folder(folder / "vectors", write_corpus(folder / "corpus.jsonl", documents))


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq", "rabitq"])
def test_parts_are_those_that_are_built(kind: Any, tmp_path: Path) -> None:
    values: dict[str, Any] = {"vectors": of_vectors(tmp_path, 53), "type": kind, "part_size": 25}
    found = plan_index(PlanIndexConfig(**values, output=tmp_path / "index"))
    built = build_index(IndexConfig(**values, output=tmp_path / "index"))
    assert found.amounts["parts"] == 1 + len(list((tmp_path / "index").glob("part-*"))) == 3
    assert found.disk_after == pytest.approx(built.bytes, abs=3 * 1500)  # manifests, and levels of graphs
    assert found.seconds is not None and all(seconds > 0 for seconds in found.seconds.values())


def planned(monkeypatch: pytest.MonkeyPatch, rows: int, dim: int, speeds: Speeds, **settings: Any) -> Estimate:
    """The plan for so many vectors that are not there."""
    given = index._Input(rows, [index.Document("a", "text")], (), rows, dim, 0.0, ())
    monkeypatch.setattr(index, "_of_corpus", lambda _: given)
    monkeypatch.setattr(index, "_block", lambda *_: np.zeros((1, dim), np.float32))
    monkeypatch.setattr(approximate, "measure", lambda *_: (speeds, "l2"))
    return plan_index(PlanIndexConfig(corpus=(Path("c"),), model="m", **settings))


@pytest.mark.parametrize("rows", [1000, 10**7])
def test_memory_is_no_less_than_what_the_trial_held(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held, peaks = iter([10**6, 2 * 10**6]), iter([200 * 10**6])  # the process; before the trial; most within it
    monkeypatch.setattr(index, "held_memory", lambda: next(held))
    monkeypatch.setattr(index, "peak_memory", lambda: next(peaks))
    found = planned(monkeypatch, rows, 64, NOTHING, type="ivfpq")
    counted = approximate.build_memory(shape(rows, 64, type="ivfpq"), rows)
    assert (counted > 198 * 10**6) is (rows == 10**7)
    assert found.memory == 10**6 + max(counted, 198 * 10**6)


def test_lists_are_those_of_a_part_and_not_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = planned(monkeypatch, 40 * 10**6, 256, replace_speeds(compare=1.0), type="ivfpq")
    config = PlanIndexConfig(corpus=(Path("c"),), model="m", type="ivfpq")
    size = build.documents_per_part(config, 40 * 10**6, 40 * 10**6, 256)
    assert compare.amounts["parts"] == 3 and size > 10**7
    nlist = shape(size, 256, type="ivfpq").settings["nlist"]
    assert compare.seconds is not None
    assert nlist < shape(40 * 10**6, 256, type="ivfpq").settings["nlist"]
    assert compare.seconds["add"] == pytest.approx(40 * 10**6 * nlist, rel=0.01)
    # Every part learns its own lists and codes, from a sample that does not grow with it.
    whole = shape(size, 256, type="ivfpq")
    learn = planned(monkeypatch, 40 * 10**6, 256, replace_speeds(learn=1.0), type="ivfpq")
    assert learn.seconds is not None
    assert learn.seconds["train"] == 3 * 256 * 2**8
    assert compare.seconds["train"] <= 3 * (10 * whole.sample(size) * nlist + 256 * 2**8 * nlist)


def replace_speeds(**speeds: float) -> Speeds:
    return NOTHING._replace(**speeds)


def test_work_grows_as_it_does() -> None:
    def seconds(rows: int, **speeds: float) -> dict[str, float]:
        return part_seconds(shape(rows, 256, type="rabitq"), rows, "float32", replace_speeds(**speeds))

    assert seconds(10**6, rotate=1.0)["add"] == 10**6 and seconds(10**6, draw=1.0)["train"] == 1
    fixed = replace(shape(10**5, 256, type="rabitq"), settings=shape(10**6, 256, type="rabitq").settings)
    once, twice = (part_seconds(fixed, rows, "float32", replace_speeds(centre=1.0)) for rows in (10**6, 2 * 10**6))
    assert once["train"] == twice["train"] > 0, "more vectors, the same sample"
    assert seconds(10**6, byte=1.0)["write"] == 128 + 4 * 256 * 10**6 + file_bytes(
        shape(10**6, 256, type="rabitq"), 10**6
    )


def test_what_a_search_holds() -> None:
    rows = 10**5
    assert search_memory(shape(rows, 256, type="hnsw"), rows, "ip") == 0
    assert search_memory(shape(rows, 256, type="ivfpq", nlist=1000), rows, "ip") == 0
    assert search_memory(shape(rows, 256, type="ivfpq", nlist=1000), rows, "l2") == 4 * 1000 * 64 * 256
    for settings in ({"type": "rabitq"}, {"type": "ivfpq", "pq_bits": 4}):
        here = shape(rows, 256, **settings)
        assert search_memory(here, rows, "l2") == file_bytes(here, rows) > rows * 32


def test_an_index_that_a_search_cannot_hold_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "device_memory", lambda: 10**9)
    found = planned(monkeypatch, 40 * 10**6, 256, NOTHING, type="rabitq")
    assert any(each.startswith("a search needs 1.") for each in found.warnings)
    assert "of a search" in found.to_text()
