"""What a batch of examples holds, as a function of seed and number."""

from pathlib import Path

import pytest

from llara.contract import Contract
from llara.training.examples import Drawn, open_examples
from tests.training.examples import draw_of, row, sets_of, settings
from tests.training.helpers import write_lines


def test_a_positive_then_hard_negatives(tmp_path: Path) -> None:
    rows = [row(f"q{i}", [f"p{i}"], [f"n{i}{j}" for j in range(i)]) for i in range(4)]
    drawn = draw_of(sets_of(tmp_path, rows), negatives=2).draw(0)
    assert sorted(each.query for each in drawn) == ["q0", "q1", "q2", "q3"]
    for each in drawn:
        number = each.query[1]
        positive, *negatives = each.passages
        assert positive == f"p{number}"
        assert len(set(negatives)) == len(negatives) == min(int(number), 2)  # those that have fewer use what they have
        assert all(text.startswith(f"n{number}") for text in negatives)
        assert (each.set, each.relevant, each.scores) == (0, (positive,), ())


def test_they_are_a_function_of_seed_and_number(tmp_path: Path) -> None:
    sets = sets_of(tmp_path, [row(f"q{i}", [f"p{i}", f"o{i}"], [f"n{i}{j}" for j in range(9)]) for i in range(4)])
    draw, again = draw_of(sets, negatives=3), draw_of(sets, negatives=3)
    made = [draw.draw(number) for number in range(4)]
    assert [again.draw(number) for number in (3, 0, 2, 1)] == [made[number] for number in (3, 0, 2, 1)]
    assert draw_of(sets, negatives=3, seed=7).draw(0) != made[0]
    of_one = [each.passages for batch in made for each in batch if each.query == "q1"]
    assert len(set(of_one)) == len(of_one) == 4, "drawn anew each pass"
    positives = {each.passages[0] for number in range(40) for each in draw.draw(number)}
    assert positives == {f"{letter}{i}" for letter in "po" for i in range(4)}
    assert [each.query for each in made[2]] == draw.queries(2)


def test_scores_follow_their_passages(tmp_path: Path) -> None:
    scores = {"pos_scores": [10.0, 11.0], "neg_scores": [0.0, 1.0, 2.0, 3.0]}
    sets = sets_of(tmp_path, [row("q", ["p0", "p1"], ["n0", "n1", "n2", "n3"], **scores)])
    seen = set()
    for number in range(8):
        (drawn,) = draw_of(sets, negatives=2, batch_size=1).draw(number)
        assert drawn.scores == tuple(int(text[1]) + (10.0 if text[0] == "p" else 0.0) for text in drawn.passages)
        seen.add(drawn.passages)
    assert len(seen) > 2


def test_titles_are_joined_as_the_contract_says(tmp_path: Path) -> None:
    passages = [{"title": "T", "text": "p"}], [{"title": "U", "text": "n"}]
    sets = sets_of(tmp_path, [{"query": "q", "pos": passages[0], "neg": passages[1]}])
    for contract, joined in (
        (Contract(title_separator=": "), ("T: p", "U: n")),
        (Contract(title_separator=None), "pn"),
    ):
        (drawn,) = draw_of(sets, contract, batch_size=1).draw(0)
        assert drawn == Drawn(0, "q", tuple(joined), (joined[0],), ())


def test_every_pass_takes_every_example_once(tmp_path: Path) -> None:
    draw = draw_of(sets_of(tmp_path, [row(f"q{i}", [f"p{i}"]) for i in range(7)]), batch_size=3)
    assert draw.per_pass == pytest.approx(7 / 3)
    queries = [query for number in range(7) for query in draw.queries(number)]
    for start in (0, 7, 14):
        assert sorted(queries[start : start + 7]) == [f"q{i}" for i in range(7)]


@pytest.mark.parametrize("homogeneous", [True, False])
def test_sets_are_mixed_or_kept_apart(tmp_path: Path, homogeneous: bool) -> None:
    sets = sets_of(tmp_path, [row(f"a{i}", ["p"]) for i in range(6)], [row(f"b{i}", ["p"]) for i in range(6)])
    draw = draw_of(sets, homogeneous=homogeneous, weights=[3, 1])
    made = [draw.draw(number) for number in range(200)]
    assert all(each.set == "ab".index(each.query[0]) for batch in made for each in batch)
    assert all(len({each.set for each in batch}) == 1 for batch in made) == homogeneous
    share = sum(each.set == 0 for batch in made for each in batch) / 800
    assert share == pytest.approx(0.75, abs=0.1 if homogeneous else 0.01)


def test_a_path_given_several_times_is_one_set_that_counts_as_often(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [row("a", ["p"])])
    second = write_lines(tmp_path / "b.jsonl", [row("b", ["p"]), row("c", ["p"])])
    config = settings(train=(first, second, first, first), dev=(second,))
    opened = open_examples(tmp_path / "examples", config)
    assert [examples.name for examples in opened.train] == [str(first), str(second)]
    assert opened.weights == [3, 1]
    assert [[examples[i].query for i in range(len(examples))] for examples in opened.dev] == [["b", "c"]]
