"""Fusion of runs: the formulas, the file, and what is refused."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from llara.cli import main
from llara.config import FuseConfig
from llara.data import rank_hits, read_run, write_run
from llara.errors import ConfigError, DataError
from llara.fuse import fuse, fuse_streams, fusion, reciprocal_rank, relative_scores
from llara.records import Hit
from tests.reference import fusion as reference


def ranking(seed: int, count: int, query_id: str = "q") -> list[Hit]:
    rng = random.Random(seed)
    names = rng.sample(range(30), count)
    return rank_hits(query_id, [(f"d{name}", rng.gauss(0, 3)) for name in names])


@pytest.mark.parametrize("weights", [(), (0.25, 1.0, 3.5)])
def test_scores_are_those_of_the_formulas(weights: Sequence[float]) -> None:
    rankings = [ranking(1, 20), ranking(2, 12), ranking(3, 0)]
    for k in (60.0, 1.5):
        expected = reference.reciprocal_rank(rankings, weights or (1, 1, 1), k)
        assert reciprocal_rank(rankings, weights, k) == pytest.approx(expected, rel=1e-12)
    expected = reference.relative_scores(rankings, weights or (1, 1, 1))
    assert relative_scores(rankings, weights) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_equal_scores_count_one_and_absent_documents_nothing() -> None:
    alone, tied = rank_hits("q", [("a", -7.0)]), rank_hits("q", [("b", 2.0), ("c", 2.0)])
    assert relative_scores([alone, tied]) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_fused_hits_are_ranked_and_cut() -> None:
    first, second = rank_hits("q", [("a", 3.0), ("b", 2.0)]), rank_hits("q", [("b", 9.0), ("c", 8.0)])
    hits = fusion("rrf", top_k=2)("q", [first, second])
    assert [(hit.document_id, hit.rank) for hit in hits] == [("b", 1), ("a", 2)]
    assert hits[0].score == pytest.approx(1 / 61 + 1 / 62)


def test_streams_are_fused_as_they_come() -> None:
    asked: list[str] = []

    def stream(name: str) -> object:
        for query_id in ("q1", "q2"):
            asked.append(f"{name} {query_id}")
            yield query_id, rank_hits(query_id, [(name, 1.0)])

    fused = fuse_streams([stream("x"), stream("y")], fusion("rrf"))  # type: ignore[list-item]
    assert next(fused)[0] == "q1" and asked == ["x q1", "y q1"]
    assert [query_id for query_id, _ in fused] == ["q2"]


def test_streams_that_come_apart_are_our_fault() -> None:
    with pytest.raises(AssertionError, match="come apart"):
        list(fuse_streams([[("q1", [])], [("q2", [])]], fusion("rrf")))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that share some of their queries, in another order."""
    queries = [f"q{number}" for number in range(6)]
    write_run(tmp_path / "a", {query_id: ranking(n, 9, query_id) for n, query_id in enumerate(queries[:5])})
    write_run(tmp_path / "b", {query_id: ranking(n + 50, 4, query_id) for n, query_id in enumerate(queries[:2:-1])})
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("method", ["rrf", "relative"])
def test_a_fused_run_holds_every_query(runs: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    config = FuseConfig(run=runs, output=tmp_path / "out", method=method, weights=(1.0, 0.5), top_k=6)  # type: ignore[arg-type]
    result = fuse(config)
    first, second = map(read_run, runs)
    found = read_run(tmp_path / "out")
    assert list(found) == ["q0", "q1", "q2", "q3", "q4", "q5"]
    twin = reference.relative_scores if method == "relative" else (lambda r, w: reference.reciprocal_rank(r, w, 60))
    for query_id, hits in found.items():
        expected = twin([first.get(query_id, []), second.get(query_id, [])], (1.0, 0.5))
        assert hits == rank_hits(query_id, expected.items())[:6]
    assert (result.queries, result.in_all_runs, result.hits) == (6, 2, sum(map(len, found.values())))
    assert (tmp_path / "out.toml").read_text().count("\n") > 3


def test_faults_of_the_settings_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        FuseConfig(run=(tmp_path,), output=tmp_path, weights=(1.0, 2.0), k=-1, top_k=0)
    for said in ("takes two runs or more, got 1", "2 for 1 runs", "--k: must be 0", "--top-k: must be 1"):
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="one of them above 0"):
        FuseConfig(run=(tmp_path, tmp_path), output=tmp_path, weights=(0.0, 0.0))


def test_what_is_wrong_with_a_run_is_found_before_anything_is_written(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with runs[1].open("a") as file:
        file.write("q9 Q0 d1 1\n")
    with pytest.raises(DataError, match=r"b:\d+: 4 columns"):
        fuse(FuseConfig(run=runs, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="is also an input"):
        fuse(FuseConfig(run=runs, output=runs[0]))


def test_the_command_fuses_what_it_is_given(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fuse", "--run", *map(str, runs), "--output", str(tmp_path / "out"), "--top-k", "3", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"output": str(tmp_path / "out"), "queries": 6, "in_all_runs": 2, "hits": 18}
    assert f"evaluate --run {tmp_path / 'out'} --qrels FILE" in printed.err
    assert main(["fuse", "--run", str(runs[0]), "--output", str(tmp_path / "out")]) == 2
