import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from llara.config import EvaluateConfig
from llara.errors import ConfigError, DataError, StorageError
from llara.evaluate import (
    bootstrap_interval,
    compare,
    evaluate,
    format_p,
    markdown_table,
    parse_metrics,
    randomisation_test,
    run_names,
)
from llara.records import Hit, Qrel

METRICS = ("nDCG@10", "R@100", "RR@10")


def hits(query: str, *documents: str) -> list[Hit]:
    return [Hit(query, document, rank, 10.0 - rank) for rank, document in enumerate(documents, 1)]


QRELS = [Qrel("q1", "a", 1), Qrel("q1", "b", 2), Qrel("q2", "c", 1), Qrel("q3", "d", 1)]


def test_metrics_by_hand() -> None:
    runs = {"ours": {"q1": hits("q1", "x", "a", "b"), "q2": hits("q2", "c"), "q3": hits("q3", "y", "z", "d")}}
    result = compare(runs, QRELS, METRICS)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert result.queries == ("q1", "q2", "q3")
    assert result.values["ours"]["nDCG@10"] == pytest.approx([(1 / math.log2(3) + 2 / 2) / ideal, 1.0, 0.5])
    assert result.values["ours"]["RR@10"] == pytest.approx([1 / 2, 1.0, 1 / 3])
    assert result.values["ours"]["R@100"] == [1.0, 1.0, 1.0]
    assert result.means["ours"]["RR@10"] == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)


def test_judged_queries_without_hits_count_as_zero() -> None:
    result = compare({"ours": {"q2": hits("q2", "c"), "q3": []}}, QRELS, METRICS)
    for metric in METRICS:
        assert result.values["ours"][metric] == [0.0, 1.0, 0.0]
        assert result.means["ours"][metric] == pytest.approx(1 / 3)
    assert result.without_hits == {"ours": 2}


def test_queries_with_only_irrelevant_judgements_count_as_zero() -> None:
    result = compare({"ours": {"q2": hits("q2", "c"), "q4": hits("q4", "e")}}, [QRELS[2], Qrel("q4", "e", 0)], METRICS)
    assert all(result.values["ours"][metric] == [1.0, 0.0] for metric in METRICS)


def test_unjudged_queries_are_left_out() -> None:
    runs = {"ours": {"q2": hits("q2", "c"), "q3": hits("q3", "d"), "q1": hits("q1", "b", "a"), "new": hits("new", "a")}}
    result = compare(runs, QRELS, METRICS)
    assert result.unjudged == {"ours": 1}
    assert result.means["ours"] == pytest.approx(dict.fromkeys(METRICS, 1.0))


def test_ties_are_broken_by_document_id_descending_for_every_metric() -> None:
    tied = [Hit("q", document, 1, 0.5) for document in ("a", "b", "c")]
    metrics = ("RR@10", "RR", "nDCG@10", "P@1", "AP")  # RR@10 comes from another provider than RR
    best, worst = (
        compare({"ours": {"q": order}}, [Qrel("q", relevant, 1)], metrics).means["ours"]
        for relevant, order in (("c", tied), ("a", tied[::-1]))
    )
    assert list(best.values()) == [1.0] * 5
    assert worst == pytest.approx({"RR@10": 1 / 3, "RR": 1 / 3, "nDCG@10": 0.5, "P@1": 0.0, "AP": 1 / 3})


def test_scores_that_differ_in_the_last_bit_are_no_tie() -> None:
    close = [Hit("q", "a", 1, float(np.nextafter(np.float32(0.5), np.float32(1)))), Hit("q", "b", 2, 0.5)]
    assert compare({"ours": {"q": close}}, [Qrel("q", "a", 1)], ["RR", "RR@10"]).means["ours"] == {"RR": 1, "RR@10": 1}


def test_identical_runs_do_not_differ() -> None:
    run = {"q1": hits("q1", "x", "a"), "q2": hits("q2", "c")}
    result = compare({"one": run, "two": run}, QRELS, METRICS, permutations=100)
    assert [each.metric for each in result.comparisons] == list(METRICS)
    for each in result.comparisons:
        assert (each.run, each.baseline) == ("two", "one")
        assert (each.difference, each.low, each.high, each.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_clearly_different_runs_have_a_small_p_value() -> None:
    queries = [f"q{number}" for number in range(40)]
    qrels = [Qrel(query, "right", 1) for query in queries]
    bad = {query: hits(query, "wrong") for query in queries}
    good = {query: hits(query, "right") for query in queries}
    (comparison,) = compare({"bad": bad, "good": good}, qrels, ["RR@10"], permutations=999).comparisons
    assert comparison.difference == comparison.low == comparison.high == 1.0
    # No permutation reaches the observed difference but the observed one itself, which counts on both sides.
    assert comparison.p_value == pytest.approx(2 / 1000)


def test_randomisation_test_against_enumeration() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = rng.random(5), rng.random(5)
    differences = ours - theirs
    signs = np.array(list(itertools.product((1, -1), repeat=5)))
    means = np.abs((signs * differences).mean(axis=1))
    exact = float((means >= abs(differences.mean()) - 1e-12).mean())
    assert randomisation_test(ours, theirs, 10_000, seed=0) == pytest.approx(exact)


def test_sampled_randomisation_test_is_near_the_exact_one_and_seeded() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.random(12) + 0.15, rng.random(12)
    exact = randomisation_test(ours, theirs, 2**12, seed=0)
    sampled = randomisation_test(ours, theirs, 4000, seed=0)
    assert 0.01 < exact < 0.99
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000) * 2)
    assert sampled == randomisation_test(ours, theirs, 4000, seed=0)


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    differences = np.random.default_rng(2).normal(0.1, 0.3, 400)
    low, high = bootstrap_interval(differences, 4000, seed=3)
    half = 1.96 * differences.std() / math.sqrt(400)
    assert low == pytest.approx(differences.mean() - half, abs=0.005)
    assert high == pytest.approx(differences.mean() + half, abs=0.005)
    assert (low, high) == bootstrap_interval(differences, 4000, seed=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndgc@10", "'ndgc@10' (did you mean 'nDCG@10'?)"),
        ("recal", "did you mean 'Recall'?"),
        ("R", "'R' does not fit ir-measures; does it lack a cutoff, as in R@10?"),
        ("nDCG@ten", "does not fit ir-measures"),
        ("nDCG(colour=1)@10", "does not fit ir-measures"),
        ("", "has no ''"),
    ],
)
def test_unknown_metrics_are_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_metrics(["nDCG@10", name])
    assert message in str(caught.value)


def test_other_names_and_parameters_of_metrics() -> None:
    result = compare({"ours": {"q1": hits("q1", "a", "b")}}, QRELS[:2], ["MRR@10", "RR(rel=2)@10"])
    assert result.means["ours"] == {"MRR@10": 1.0, "RR(rel=2)@10": 0.5}


def write_run(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_qrels(path: Path) -> Path:
    path.write_text("".join(f"{each.query_id} 0 {each.document_id} {each.relevance}\n" for each in QRELS))
    return path


def test_evaluate_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qrels = write_qrels(tmp_path / "qrels.txt")
    one = write_run(tmp_path / "bm25.run", "q1 Q0 x 1 3.5 t", "q1 Q0 a 2 3.25 t", "q8 Q0 a 1 1 t")
    two = write_run(tmp_path / "dense.run", "q1 Q0 b 1 0.5 t", "q2 Q0 c 1 0.5 t", "q3 Q0 d 1 0.5 t")
    output = tmp_path / "out" / "result.json"
    result = evaluate(EvaluateConfig(run=(one, two), qrels=qrels, metrics=("RR@10",), output=output, permutations=50))
    assert result.means == {"bm25": {"RR@10": pytest.approx(0.5 / 3)}, "dense": {"RR@10": 1.0}}
    told = capsys.readouterr().err
    assert "bm25: 1 queries have no judgements and are left out: q8" in told
    assert "bm25: 2 judged queries have no hits and count as zero: q2, q3" in told
    saved = json.loads(output.read_text())
    assert saved.pop("config")["permutations"] == 50
    assert saved == json.loads(json.dumps(result.to_json()))
    assert saved["values"]["bm25"]["RR@10"] == [0.5, 0.0, 0.0]


def test_runs_that_share_no_query_with_the_judgements(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.txt", "17 Q0 x 1 3.5 t")
    with pytest.raises(DataError, match=r"run.txt: none of its 1 queries \(for example '17'\) has judgements in"):
        evaluate(EvaluateConfig(run=(run,), qrels=write_qrels(tmp_path / "qrels.txt")))


def test_run_names_are_as_long_as_they_need_to_be() -> None:
    assert run_names([Path("a/bm25.run"), Path("b/dense.run")]) == ["bm25", "dense"]
    assert run_names([Path("a/test.run"), Path("b/test.run")]) == ["a/test", "b/test"]
    with pytest.raises(ConfigError, match="given twice"):
        run_names([Path("a/test.run"), Path("a/../a/test.run")])


def test_text_is_an_aligned_table() -> None:
    one = {"q1": hits("q1", "x", "a"), "q2": hits("q2", "c"), "q3": hits("q3", "d")}
    two = {"q1": hits("q1", "b"), "q2": hits("q2", "c"), "q3": hits("q3", "d")}
    text = compare({"one": one, "second": two}, QRELS, ["RR@10"], permutations=2000).to_text()
    assert text.splitlines()[:4] == [
        "| run    |                     RR@10 |",
        "| ------ | ------------------------: |",
        "| one    |                    0.8333 |",
        "| second | 1.0000 (+0.1667, p=1.000) |",
    ]
    assert "3 judged queries; differences to one" in text
    assert "| second |  RR@10 |    +0.1667 | +0.0000 to +0.5000 | 1.000 |" in text
    single = compare({"one": one}, QRELS, ["RR@10"]).to_text()
    assert single.endswith("3 judged queries")


def test_small_pieces_of_text() -> None:
    assert [format_p(value) for value in (0.0002, 0.001, 0.0421, 1.0)] == ["p<0.001", "p=0.001", "p=0.042", "p=1.000"]
    assert markdown_table([["a", "b"], ["c", "12.5"]]) == "| a   |    b |\n| --- | ---: |\n| c   | 12.5 |"


def test_an_output_that_is_also_an_input_is_refused(tmp_path: Path) -> None:
    run, qrels = write_run(tmp_path / "run.txt", "q1 Q0 a 1 3.5 t"), write_qrels(tmp_path / "qrels.tsv")
    for path in (run, qrels):
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=r"--output: .* is also an input"):
            evaluate(EvaluateConfig(run=(run,), qrels=qrels, output=path))
        assert path.read_bytes() == before
    with pytest.raises(StorageError, match="is a folder"):
        evaluate(EvaluateConfig(run=(tmp_path / "not read",), qrels=qrels, output=tmp_path))


def test_one_judged_query_tells_no_difference() -> None:
    runs = {"one": {"q2": hits("q2", "x", "c")}, "two": {"q2": hits("q2", "c")}}
    (comparison,) = compare(runs, [QRELS[2]], ("RR@10",)).comparisons
    assert (comparison.difference, comparison.low, comparison.high, comparison.p_value) == (0.5, 0.5, 0.5, 1.0)


def test_a_run_without_any_hit_counts_as_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, empty = write_run(tmp_path / "full.run", "q1 Q0 a 1 3.5 t"), tmp_path / "empty.run"
    empty.write_bytes(b"")
    qrels = write_qrels(tmp_path / "qrels.tsv")
    result = evaluate(EvaluateConfig(run=(full, empty), qrels=qrels, permutations=50))
    assert result.means["full"]["RR@10"] > 0
    assert set(result.means["empty"].values()) == {0.0}
    assert result.without_hits["empty"] == len(result.queries)
    assert f"empty: {len(result.queries)} judged queries have no hits and count as zero" in capsys.readouterr().err
    alone = evaluate(EvaluateConfig(run=(empty,), qrels=qrels))
    assert set(alone.means["empty"].values()) == {0.0}
