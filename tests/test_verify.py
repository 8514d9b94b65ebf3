"""`verify` finds any changed byte, and says what it looked at."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from llara.config import EncodeConfig, IndexConfig, ModelConfig, VerifyConfig
from llara.encoding.encode import encode
from llara.errors import LlaraError, ModelError, StorageError
from llara.files import write_json_atomic
from llara.index.build import build_index
from llara.loading import load_model
from llara.retriever import Retriever
from llara.verify import VerifyReport, _settings, terms_apart, verify

FOLDERS = ("model", "vectors", "sparse-vectors", "flat", "sparse", "bm25")
UNCHECKED = {".lock"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, made from ten documents."""
    root = tmp_path_factory.mktemp("made")
    corpus = root / "corpus.jsonl"
    corpus.write_text("".join(f'{{"_id": "d{i}", "text": "text number {i} of ten"}}\n' for i in range(10)))
    encode(EncodeConfig(model="mini", corpus=(corpus,), output=root / "vectors"))
    encode(EncodeConfig(model="mini", corpus=(corpus,), output=root / "sparse-vectors", sparse=True))
    build_index(IndexConfig(vectors=root / "vectors", output=root / "flat"))
    build_index(IndexConfig(vectors=root / "sparse-vectors", type="sparse", output=root / "sparse"))
    build_index(IndexConfig(corpus=(corpus,), type="bm25", output=root / "bm25"))
    load_model(ModelConfig(model="mini")).save(root / "model")
    return root


def check(path: Path) -> VerifyReport:
    return verify(VerifyConfig(path=path))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNCHECKED)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_sound_folder_is_counted_whole(name: str, made: Path) -> None:
    report = check(made / name)
    sizes = [path.stat().st_size for path in files(made / name)]
    kinds = {"flat": "index", "sparse": "index", "bm25": "index", "sparse-vectors": "vectors"}
    assert report.kind == kinds.get(name, name)
    assert (report.files, report.bytes) == (len(sizes), sum(sizes))
    assert "all as written" in report.to_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_any_changed_byte_is_found(name: str, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(made / name, folder)
    for path in files(folder):
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1} if whole else set():
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(LlaraError):
                check(folder)
        path.write_bytes(whole)
        path.rename(path.with_suffix(".gone"))
        with pytest.raises(LlaraError):
            check(folder)
        path.with_suffix(".gone").rename(path)


def test_what_was_computed_again_is_said(made: Path) -> None:
    assert check(made / "model").vectors.startswith("gives the ")
    assert check(made / "vectors").vectors == "10 vectors computed again, all the same"
    assert check(made / "sparse-vectors").vectors == "10 vectors and sparse vectors computed again, all the same"


def test_what_is_no_folder_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no such folder"):
        check(tmp_path / "none")
    with pytest.raises(StorageError, match=r"holds neither llara\.json .* nor manifest\.json"):
        check(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is no folder"):
        check(tmp_path / "file")
    write_json_atomic(tmp_path / "manifest.json", {"kind": "else"})
    with pytest.raises(StorageError, match="is no index folder, it holds else"):
        check(tmp_path)


def test_a_vector_that_the_model_does_not_give_is_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Retriever.encode_passages
    monkeypatch.setattr(Retriever, "encode_passages", lambda *args, **named: np.roll(given(*args, **named), 1, 0))
    with pytest.raises(StorageError, match=r"document 'd0': its vector is not the one that mini gives"):
        check(made / "vectors")


def test_a_sparse_vector_that_the_model_does_not_give_is_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Retriever.encode_passages_with_terms

    def changed(*arguments: object, **named: object) -> object:
        vectors, terms = given(*arguments, **named)  # type: ignore[arg-type]
        terms.weights[terms.starts[4]] *= 1.1
        return vectors, terms

    monkeypatch.setattr(Retriever, "encode_passages_with_terms", changed)
    with pytest.raises(StorageError, match=r"document 'd4': its sparse vector is not the one that mini gives: 0\.0"):
        check(made / "sparse-vectors")


def test_terms_that_change_places_at_the_cut_are_not_apart() -> None:
    stored = (np.array([7, 3, 5]), np.array([3.0, 2.0, 1.0]))
    again = (np.array([7, 3, 9]), np.array([3.0, 2.0, 1.0]))
    assert terms_apart(stored, stored, 3) == 0
    assert terms_apart(stored, again, 3) == 0
    assert terms_apart(stored, again, 4) == pytest.approx(1 / 14**0.5)
    assert terms_apart(stored, (np.array([7, 3]), np.array([3.0, 2.5])), 4) == pytest.approx(1 / 14**0.5)
    assert terms_apart((np.array([]), np.array([])), (np.array([1]), np.array([0.25])), 4) == 0.25


def test_the_model_of_vectors_is_found_from_any_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "made"))
    monkeypatch.chdir(copy)
    encode(EncodeConfig(model="model", corpus=(Path("corpus.jsonl"),), output=Path("ours")))
    monkeypatch.chdir(tmp_path)
    assert check(copy / "ours").vectors == "10 vectors computed again, all the same"
    (copy / "model").rename(tmp_path / "elsewhere")
    assert check(copy / "ours").vectors.startswith(
        f"no vector was computed again, its model does not open: {copy / 'model'}"
    )


def test_a_path_may_hold_any_character(made: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copy(made / "corpus.jsonl", tmp_path / "\U0001f600.jsonl"))
    encode(EncodeConfig(model="mini", corpus=(corpus,), output=tmp_path / "vectors"))
    assert check(tmp_path / "vectors").vectors == "10 vectors computed again, all the same"


def test_settings_that_are_no_toml_are_named(tmp_path: Path) -> None:
    for content in (b'query = "\\ud83d\\ude00"\n', b"\xff"):
        (tmp_path / "config.toml").write_bytes(content)
        with pytest.raises(StorageError, match=r"config\.toml: cannot be read as TOML: "):
            _settings(tmp_path)


def test_a_model_that_is_gone_is_said_and_no_fault(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object, **named: object) -> None:
        raise ModelError("x: no such folder")

    monkeypatch.setattr(Retriever, "load", gone)
    assert check(made / "vectors").vectors == "no vector was computed again, its model does not open: x: no such folder"
