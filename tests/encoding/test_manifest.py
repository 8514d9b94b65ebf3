"""How a record names a model, and finds it again."""

from pathlib import Path

import pytest

from llara.encoding.manifest import find_model, is_local, record_model


@pytest.mark.parametrize("place", ["models/ours", "ours", "runs/vectors/model", "runs/.cache/model", "runs"])
def test_a_local_folder_is_named_by_a_path_that_starts_with_a_dot(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recorded = record_model(place, Path("runs"))
    assert recorded.startswith(".")
    assert recorded == record_model(str(tmp_path / place), tmp_path / "runs")
    monkeypatch.chdir("/")
    found = find_model(recorded, tmp_path / "runs")
    assert found == str(tmp_path / place)
    assert is_local(found)


def test_what_is_no_folder_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mini").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("mini", "organisation/name"):
        assert find_model(record_model(name, tmp_path / "v"), tmp_path / "v") == name
    (tmp_path / "organisation" / "name").mkdir(parents=True)
    assert is_local("mini")
    assert not is_local("organisation/name")
    assert not is_local("")
    assert not is_local(str(tmp_path / "gone"))
