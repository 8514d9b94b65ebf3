"""What a corpus holds: counted where it is small, estimated from a sample all over it where it is not."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llara.data import read_rows
from llara.errors import DataError
from llara.plan import corpus
from llara.plan.corpus import Survey, documents, draw_sample, good_documents, store, survey

ROWS = 2000


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every corpus one that is too large to be read whole."""
    monkeypatch.setattr(corpus, "COUNT_BYTES", 0)


def text_of(number: int) -> str:
    return "word " * (5 + number % 40 + number // 50)  # later rows are longer: their beginning does not stand for them


def rows() -> list[dict[str, Any]]:
    return [{"_id": f"d{number}", "text": text_of(number)} for number in range(ROWS)]


def write(path: Path, made: Iterable[Mapping[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            text = "".join(json.dumps(row) + "\n" for row in made)
        case ".tsv":
            text = "".join(f"{row['_id']}\t{row['text']}\r\n" for row in made)
        case _:
            text = "\n\n".join(str(row["text"]) for row in made) + "\n"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def total(found: Survey) -> float:
    """Characters of text in the whole corpus, in the proportion of the sample."""
    return sum(len(document.text.strip()) for document in documents(found.sample)) * found.scale


@pytest.mark.parametrize("name", ["c.jsonl", "c.tsv", "c.txt"])
def test_a_small_corpus_is_counted(name: str, tmp_path: Path) -> None:
    found = survey([write(tmp_path / name, rows())], 200, seed=1)
    assert (found.rows, found.counted, len(found.sample), found.remarks) == (ROWS, True, 200, ())
    assert found.bytes == pytest.approx((tmp_path / name).stat().st_size, rel=0.01)
    assert total(found) == pytest.approx(sum(len(text_of(number).strip()) for number in range(ROWS)), rel=0.05)


def test_a_sample_as_large_as_the_corpus_is_the_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", rows()[:50])
    found = survey([path], 50, seed=1)
    assert [each.row for each in found.sample] == list(read_rows([path]))
    assert found.scale == 1


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["c.jsonl", "c.tsv", "c.txt"])
def test_a_large_file_is_read_all_over(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, rows())
    found = survey([path], 400, seed=1)
    assert not found.counted
    assert found.rows == pytest.approx(ROWS, rel=0.1)
    assert found.bytes == path.stat().st_size
    assert total(found) == pytest.approx(sum(len(text_of(number).strip()) for number in range(ROWS)), rel=0.05)
    assert len(found.sample) == pytest.approx(400, rel=0.3)
    assert len(found.remarks) == 1
    assert found.remarks[0].endswith("of them, read at 100 places all over the file")
    whole = {row.data.partition(b"\n")[2] if row.kind == "text" else row.data for row in read_rows([path])}
    read = {each.row.data.partition(b"\n")[2] if each.row.kind == "text" else each.row.data for each in found.sample}
    assert read <= whole, "rows are whole"
    assert found.read_seconds > 0


@pytest.mark.usefixtures("large")
def test_a_sample_follows_from_its_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", rows())
    one, same, other = (survey([path], 40, seed).sample for seed in (1, 1, 2))
    assert one == same
    assert one != other


@pytest.mark.usefixtures("large")
def test_of_a_packed_file_the_beginning_stands_for_the_rest_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = [{"_id": f"d{number}", "text": f"{number} {'word ' * 30}"} for number in range(20_000)]
    plain = write(tmp_path / "c.jsonl", alike)
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    monkeypatch.setattr(corpus, "HEAD_BYTES", plain.stat().st_size // 2)
    found = survey([packed], 100, seed=1)
    assert found.rows == pytest.approx(len(alike), rel=0.15)
    assert found.bytes == pytest.approx(plain.stat().st_size, rel=0.15)
    assert len(found.sample) == 100
    assert found.remarks[0].startswith("c.jsonl.gz: packed, so only its beginning was read")


@pytest.mark.usefixtures("large")
def test_files_of_a_folder_are_counted_and_some_read(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for number in range(30):
        (folder / "sub" / f"{number:02}.txt").write_text(text_of(number))
    (folder / ".hidden.txt").write_text("no document")
    found = survey([folder], 10, seed=1)
    assert (found.rows, found.counted, len(found.sample)) == (30, True, 10)
    assert total(found) == pytest.approx(sum(len(text_of(number)) for number in range(30)), rel=0.1)
    assert {document.id for document in documents(found.sample)} <= {f"sub/{number:02}.txt" for number in range(30)}


@pytest.mark.usefixtures("large")
def test_parquet_tells_its_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    made = [{"_id": f"d{number}", "text": "word " * 30} for number in range(500)]
    parquet.write_table(pa.Table.from_pylist(made), tmp_path / "c.parquet")
    found = survey([tmp_path / "c.parquet"], 20, seed=1)
    assert (found.rows, len(found.sample)) == (500, 20)
    assert "the first 20 rows" in found.remarks[0]


@pytest.mark.usefixtures("large")
def test_several_corpora_share_the_sample_by_their_size(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", rows()), write(tmp_path / "b.jsonl", rows()[:200])]
    found = survey(paths, 400, seed=1)
    assert found.rows == pytest.approx(ROWS + 200, rel=0.1)
    from_b = sum(1 for each in found.sample if each.row.path.endswith("b.jsonl"))
    assert 0 < from_b < 40


def test_each_item_has_the_same_chance_to_be_drawn() -> None:
    counts = [0] * 20
    for seed in range(2000):
        drawn = draw_sample(range(20), 5, seed)
        assert len(drawn) == 5 and drawn == sorted(drawn)
        for item in drawn:
            counts[item] += 1
    assert all(counts[item] == pytest.approx(500, abs=100) for item in range(20))
    assert draw_sample(range(3), 5, 0) == [0, 1, 2]


def test_the_first_bad_row_is_named_as_the_job_would_name_it(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", rows()[:20])
    path.write_text(path.read_text().replace('"_id": "d7", ', ""))
    sample = survey([path], 20, seed=1).sample
    with pytest.raises(DataError, match=f"{path}:8: no id"):
        documents(sample)
    assert len(good_documents(sample)) == 19


@pytest.mark.usefixtures("large")
def test_a_bad_row_whose_line_is_unknown_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(500)))
    sample = survey([path], 20, seed=1).sample
    with pytest.raises(DataError, match=rf"{path}: near byte [\d,]+: no id"):
        documents(sample)
    with pytest.raises(DataError, match=r"no id .*; nor is any other row of the sample a document"):
        good_documents(sample)


@pytest.mark.parametrize("name", ["none.jsonl", "none"])
def test_a_path_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name}: no such file or folder"):
        survey([tmp_path / name], 10, seed=1)


def test_a_file_without_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty.jsonl: the file is empty"):
        survey([tmp_path / "empty.jsonl"], 10, seed=1)


def test_what_a_store_of_the_sample_takes_is_measured(tmp_path: Path) -> None:
    sample = survey([write(tmp_path / "c.jsonl", rows()[:100])], 100, seed=1).sample
    stored = store(tmp_path / "stores", sample)
    whole = sum(path.stat().st_size for path in (tmp_path / "stores" / "1").iterdir())
    assert stored.bytes_per_row == whole / 100
    assert stored.seconds(0, 1) == stored.seconds_per_shard > 0
    assert stored.seconds(1000, 1) == pytest.approx(stored.seconds_per_shard + 1000 * stored.seconds_per_row)
