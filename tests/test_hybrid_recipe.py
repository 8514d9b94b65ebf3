"""recipes/hybrid.py on a collection of twenty documents: all systems are measured, once, and compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from llara.config import FuseConfig
from llara.data import read_qrels, read_run
from llara.evaluate import compare
from llara.fuse import fuse
from tests import tiny

pytestmark = pytest.mark.usefixtures("recipes_importable")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
WORDS = ("sky", "blue", "air", "light", "file", "line", "read", "close", "vector", "number", "token", "model")


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """A BEIR folder: each document is three words, each query the first two of one."""
    folder = tmp_path / "small"
    (folder / "qrels").mkdir(parents=True)
    texts = [" ".join(WORDS[(3 * n + step * (1 + n % 4)) % len(WORDS)] for step in range(3)) for n in range(20)]
    rows = [json.dumps({"_id": f"d{n}", "title": "", "text": text}) for n, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(row + "\n" for row in rows))
    queries = [json.dumps({"_id": f"q{n}", "text": " ".join(text.split()[:2])}) for n, text in enumerate(texts)]
    (folder / "queries.jsonl").write_text("".join(row + "\n" for row in queries))
    for split, numbers in {"dev": range(10), "test": range(10, 20)}.items():
        lines = [f"q{n}\td{n}\t1\n" for n in numbers]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(["query-id\tcorpus-id\tscore\n", *lines]))
    return folder


def test_all_systems_are_measured_once(
    collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import hybrid

    tiny.model().save(tmp_path / "model")
    monkeypatch.setattr(hybrid, "GRID", (0.5, 1.0))
    output, result = tmp_path / "runs", tmp_path / "result.md"
    line = ["--model", str(tmp_path / "model"), "--output", str(output), "--collections", f"small={collection}"]
    line += ["--device", "cpu", "--result", str(result)]
    assert hybrid.main(line) == 0
    text, (cell,) = result.read_text(), json.loads(result.with_suffix(".json").read_text())
    assert text.strip() in capsys.readouterr().out
    systems = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:]
    assert systems[:4] == ["dense", "sparse", "bm25", "dense+bm25, rrf"] and len(systems) == 3 + 3 * 3
    assert sorted(systems) == sorted(cell["means"])
    assert "small: 10 queries" in text and "p=" in text and "Weights from dev: dense+bm25 1 : " in text
    assert all(len(values) == 10 for values in cell["values"].values())
    assert_as_the_commands_do(cell, collection, output / "small", tmp_path)

    monkeypatch.setattr(hybrid, "measure", lambda *_: pytest.fail("measured again"))
    assert hybrid.main(line) == 0
    assert result.read_text() == text
    monkeypatch.setattr(hybrid, "measure", lambda *given: {**cell, "settings": given[-1]})
    assert hybrid.main([*line, "--fold"]) == 0
    assert json.loads((output / "small.json").read_text())["settings"] == {**cell["settings"], "fold": True}
    assert "without expansion, folded" in result.read_text()


def assert_as_the_commands_do(cell: dict[str, Any], collection: Path, folder: Path, scratch: Path) -> None:
    qrels, names = read_qrels(collection, "test"), ("dense", "sparse", "bm25")
    weights = tuple(cell["weights"]["dense+sparse+bm25"])
    assert weights[0] == 1 and set(weights) <= {0.5, 1.0}
    paths = tuple(folder / f"{name}-test.trec" for name in names)
    for system, settings in (("rrf", {}), ("relative, dev weights", {"method": "relative", "weights": weights})):
        fuse(FuseConfig(run=paths, output=scratch / "fused", **settings))  # type: ignore[arg-type]
        found = compare({"fused": read_run(scratch / "fused")}, qrels, ("nDCG@10", "R@100")).means["fused"]
        assert cell["means"][f"dense+sparse+bm25, {system}"] == pytest.approx(found, abs=1e-5)


def test_weights_are_those_that_are_best_on_dev() -> None:
    import hybrid

    from llara.records import Hit, Qrel

    def run(*documents: str) -> dict[str, list[Hit]]:
        return {"q": [Hit("q", each, rank, 1.0 / rank) for rank, each in enumerate(documents, 1)]}

    runs = {"dense": run("z", "b", "c", "a"), "bm25": run("a", "c", "b", "z")}
    assert hybrid.best_weights(("dense", "bm25"), runs, [Qrel("q", "a", 1)]) == (1.0, 2.0), "the least that is enough"
    assert hybrid.best_weights(("dense", "bm25"), runs, [Qrel("q", "z", 1)]) == (1.0, 1.0), "a tie goes to the later id"


def test_the_weights_of_two_runs_are_written(collection: Path, tmp_path: Path) -> None:
    import fusion_weights

    # The first run has the relevant document second, the second one has it first; on test it is nowhere.
    def run(shift: int) -> str:
        rows = [(n, rank) for n in range(10) for rank in (0, 1)]
        return "".join(f"q{n} Q0 d{n + (rank + shift) % 2} {rank + 1} {2.0 - rank} run\n" for n, rank in rows)

    (tmp_path / "first").write_text(run(1))
    (tmp_path / "second").write_text(run(0))
    given = [str(tmp_path / name) for name in ("first", "second")]
    assert fusion_weights.main([*given, str(collection), str(tmp_path / "weights")]) == 0
    assert (tmp_path / "weights").read_text() == "1 2\n", "the least weight under which the second run decides"
    assert fusion_weights.main([*reversed(given), str(collection), str(tmp_path / "weights")]) == 0
    assert (tmp_path / "weights").read_text() == "1 0.5\n"


def test_an_unknown_collection_is_named(tmp_path: Path) -> None:
    import hybrid

    tiny.model().save(tmp_path / "model")
    with pytest.raises(SystemExit, match="squad is none of scifact, medquad, docs; give NAME=PATH"):
        hybrid.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "runs"), "--collections", "squad"])
