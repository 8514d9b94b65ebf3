"""The plans of recipes/ablation.py hold arms that can run, and its report says what the cells say."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("recipes_importable")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PLANS = sorted(RECIPES.glob("ablation*.toml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_every_arm_of_a_plan_is_a_configuration_that_its_stages_take(path: Path) -> None:
    import ablation

    plan = ablation.read_plan(path)
    assert plan.split in ("dev", "test")
    assert set(plan.baselines) <= set(plan.arms)
    for arm in plan.arms:
        adapt, finetune = ablation.configs(plan, arm, seed=7)
        assert finetune.seed == 7
        assert finetune.model == ("mini" if adapt is None else str(adapt.output))
        if adapt is not None:
            assert adapt.seed == 7
            assert finetune.template == (adapt.template or "paper")


def test_arms_share_their_fine_tuning() -> None:
    import ablation

    from llara.config import to_plain

    plan = ablation.read_plan(RECIPES / "ablation.toml")
    stages = [ablation.portable(to_plain(ablation.configs(plan, arm, 1)[1])) for arm in plan.arms]
    for stage in stages:
        stage.pop("template")  # the arm that compares templates keeps its own
    assert all(stage == stages[0] for stage in stages)


def test_an_arm_with_documents_of_its_own_adapts_on_them_and_no_other_does() -> None:
    import ablation

    plan = ablation.read_plan(RECIPES / "ablation_dev.toml")
    own = {arm for arm, changes in plan.arms.items() if "documents" in changes}
    assert own
    for arm in plan.arms:
        adapt, finetune = ablation.configs(plan, arm, 1)
        assert [path.name for path in finetune.train] == ["train.jsonl"]
        if adapt is not None:
            assert [path.name for path in adapt.corpus] == [f"text-{arm}.jsonl" if arm in own else "text.jsonl"]
        assert set(plan.documents(arm)) == set(plan.documents("none"))
        assert (plan.documents(arm) == plan.documents("none")) == (arm not in own)


def test_a_sample_takes_all_rows_as_often_as_they_fit() -> None:
    import ablation

    assert list(ablation._sample(3, 6)) == [0, 1, 2, 0, 1, 2]
    drawn = list(ablation._sample(10, 4))
    assert drawn == sorted(set(drawn)) and len(drawn) == 4
    assert drawn == list(ablation._sample(10, 4))


def cell(arm: str, seed: int, value: float, data: str = "a") -> dict[str, Any]:
    collections = {
        name: {"means": {"nDCG@10": value, "R@100": 0.5}, "nDCG@10": [value, value + 0.1 * (seed % 2), value] * 10}
        for name in ("scifact", "medquad", "docs")
    }
    made = {"commit": "abc1234", "date": "2020-01-02", "hardware": "a machine", "seconds": {"finetune": 60.0}}
    return {"arm": arm, "seed": seed, "split": "test", "data": {"text": data}, "collections": collections, **made}


def write_cells(folder: Path, *cells: dict[str, Any]) -> Any:
    import ablation

    class Here(ablation.Plan):  # type: ignore[name-defined,misc]
        results = folder / "cells"

    here = Here(**vars(ablation.read_plan(RECIPES / "ablation.toml")))
    here.results.mkdir()
    for each in cells:
        here.result(each["arm"], each["seed"]).write_text(json.dumps(each), encoding="utf-8")
    return here


def test_a_report_compares_each_arm_with_the_baselines(tmp_path: Path) -> None:
    import ablation_report

    plan = write_cells(tmp_path, *(cell("none", s, 0.2) for s in (1, 2)), *(cell("both", s, 0.5) for s in (1, 2)))
    text = ablation_report.report(plan, ablation_report.read_cells(plan))
    row = next(line for line in text.splitlines() if line.startswith("| both"))
    # 0.5 and, for every third query, 0.05 more in the mean of an odd and an even seed
    assert "0.5167" in row and "+0.3000 [" in row and "p<0.001" in row
    assert "SciFact: 30 queries" in text and "abc1234" in text


def test_an_arm_whose_name_goes_on_from_anothers_is_an_arm_of_its_own(tmp_path: Path) -> None:
    import ablation_report

    plan = write_cells(tmp_path, cell("both", 1, 0.3))
    plan.arms["both-2M"] = {}
    plan.result("both-2M", 1).write_text(json.dumps(cell("both-2M", 1, 0.6)), encoding="utf-8")
    found = ablation_report.read_cells(plan)
    assert {arm: [each["arm"] for each in cells] for arm, cells in found.items()} == {
        "both": ["both"],
        "both-2M": ["both-2M"],
    }


def test_cells_of_other_data_are_refused(tmp_path: Path) -> None:
    import ablation_report

    plan = write_cells(tmp_path, cell("none", 1, 0.2), cell("both", 1, 0.3, data="b"))
    with pytest.raises(SystemExit, match="different data"):
        ablation_report.read_cells(plan)
