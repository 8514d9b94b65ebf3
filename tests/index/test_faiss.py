import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.config import IndexConfig
from llara.errors import ConfigError, ModelError, StorageError
from llara.index import faiss as approximate
from llara.index import written
from llara.index.base import Allowed, Manifest
from llara.index.faiss import Effort, FaissIndex
from llara.index.flat import FILE
from llara.index.opening import open_index
from llara.index.shape import TYPES, VECTORS, Shape, usual_pieces
from llara.index.written import write_index
from tests.index.helpers import make_faiss, make_flat
from tests.reference.ranking import inner_products, order

DIM, COUNT = 16, 900
IDS = [f"d{(7 * number) % COUNT}" for number in range(COUNT)]


def clustered(rows: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Unit vectors around 30 centres, as texts lie around topics."""
    centres = np.random.default_rng(9).standard_normal((30, DIM))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 30, rows)] + 0.6 * rng.standard_normal((rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def nothing_is_too_small_for_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "EXACT", 0)


def overlap(found: Any, vectors: Any, queries: Any, allowed: Any = None) -> float:
    """Share of the true hits that were found."""
    shares = []
    for row, query in enumerate(queries):
        scores = np.array(inner_products(query, vectors))
        if allowed is not None:
            scores[~allowed] = -2
        expected = order(scores.tolist(), IDS, found.shape[1])
        shares.append(len(set(found[row].tolist()) & set(expected)) / found.shape[1])
    return float(np.mean(shares))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", TYPES)
def test_nearly_all_true_hits_are_found_with_their_true_scores(tmp_path: Path, kind: str, dtype: str) -> None:
    vectors, queries = clustered(COUNT).astype(dtype), clustered(15, 1)
    index = make_faiss(tmp_path, vectors, IDS, kind)
    found = index.search(queries, 10)
    assert overlap(found.positions, vectors.astype(np.float32), queries) > 0.95
    for query, scores, positions in zip(queries, *found, strict=True):
        exact = inner_products(query, vectors[positions].astype(np.float32))
        assert scores.tolist() == pytest.approx(exact, rel=2e-7)
        assert [*scores] == sorted(scores, reverse=True)


@pytest.mark.parametrize("settings", [{"pq_m": 4}, {"pq_m": 8, "pq_bits": 4}, {"rabitq_bits": 2}])
def test_vectors_in_a_narrow_cone_are_told_apart(tmp_path: Path, settings: dict[str, Any]) -> None:
    centre = clustered(1, 5)[0]
    vectors, queries = (20 * centre + clustered(rows, seed) for rows, seed in ((COUNT, 0), (10, 1)))
    vectors, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors, queries))
    assert (queries @ vectors.T).min() > 0.98
    kind = "rabitq" if "rabitq_bits" in settings else "ivfpq"
    index = make_faiss(tmp_path, vectors, IDS, kind, nlist=8, **settings)
    assert index.manifest.settings["metric"] == "l2"
    assert overlap(index.search(queries, 10).positions, vectors, queries) > 0.9


@pytest.mark.parametrize("kind", TYPES)
def test_a_document_has_the_score_that_it_has_in_a_flat_index(tmp_path: Path, kind: str) -> None:
    vectors, queries = clustered(200), clustered(5, 1)
    flat = make_flat(tmp_path / "flat", vectors, IDS[:200]).search(queries, 200)
    found = make_faiss(tmp_path / "other", vectors, IDS[:200], kind).search(queries, 10)
    for row in range(5):
        exact = dict(zip(flat.positions[row].tolist(), flat.scores[row].tolist(), strict=True))
        assert found.scores[row].tolist() == [exact[at] for at in found.positions[row].tolist()]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("share", [0.5, 0.02])
def test_a_filter_costs_no_hits(tmp_path: Path, kind: str, share: float) -> None:
    vectors, queries = clustered(COUNT), clustered(20, 1)
    allowed = np.random.default_rng(2).random(COUNT) < share
    found = make_faiss(tmp_path, vectors, IDS, kind).search(queries, 10, Allowed.of(allowed)).positions
    assert found.shape == (20, 10) and allowed[found].all()
    assert overlap(found, vectors, queries, allowed) > 0.9


@pytest.mark.parametrize("kind", TYPES)
def test_more_effort_finds_more(tmp_path: Path, kind: str) -> None:
    vectors, queries = clustered(COUNT), clustered(15, 1)
    make_faiss(
        tmp_path, vectors, IDS, kind, **({"hnsw_m": 2, "ef_construction": 4} if kind == "hnsw" else {"nlist": 30})
    )
    dial = "ef_search" if kind == "hnsw" else "nprobe"
    shares = [
        overlap(open_index(tmp_path, effort=Effort(**{dial: value})).search(queries, 1).positions, vectors, queries)
        for value in (1, 1000)
    ]
    assert shares[0] < shares[1] > 0.75


def test_candidates_per_hit(tmp_path: Path) -> None:
    vectors, queries = clustered(COUNT), clustered(15, 1)
    make_faiss(tmp_path, vectors, IDS, "ivfpq", pq_m=1, pq_bits=2)
    shares = [
        overlap(open_index(tmp_path, effort=Effort(refine=value)).search(queries, 5).positions, vectors, queries)
        for value in (1, 180)
    ]
    assert shares[0] < 0.3 and shares[1] > 0.9


@pytest.mark.parametrize("kind", TYPES)
def test_the_same_vectors_and_seed_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # what hnsw needs
    try:
        for name, seed in (("one", 5), ("two", 5), ("three", 6)):
            make_faiss(tmp_path / name, clustered(COUNT), IDS, kind, seed=seed)
    finally:
        faiss.omp_set_num_threads(threads)
    digests = [hashlib.sha256((tmp_path / name / FILE).read_bytes()).digest() for name in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {FILE, "ids.txt", "ids.offsets.npy", "manifest.json", *([] if kind == "hnsw" else [VECTORS])}


OPENED_TWICE = """
import sys
from pathlib import Path
from llara.index.opening import open_index

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

first = open_index(Path(sys.argv[1]))  # what a first opening loads is not the index
before = anonymous()
second = open_index(Path(sys.argv[1]))
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/self/smaps_rollup")
@pytest.mark.parametrize(
    ("count", "settings", "held"),
    [
        (5_000, {"kind": "hnsw", "hnsw_m": 2, "ef_construction": 4}, False),
        (40_000, {"kind": "ivfpq", "nlist": 2, "pq_m": 16, "pq_bits": 5}, False),
        (40_000, {"kind": "ivfpq", "nlist": 2, "pq_m": 16, "pq_bits": 4}, True),
        (40_000, {"kind": "rabitq", "nlist": 2, "rabitq_bits": 2}, True),
    ],
)
def test_what_is_mapped_and_what_is_held(tmp_path: Path, count: int, settings: dict[str, Any], held: bool) -> None:
    """FAISS copies codes that it compares in blocks; all else stays on the disk until it is looked at."""
    vectors = np.tile(clustered(count), 4)
    index = make_faiss(tmp_path, vectors, [f"d{number}" for number in range(count)], **settings)
    assert Shape(index.manifest.type, index.dim, dict(index.manifest.settings)).holds_codes == held
    script = [sys.executable, "-c", OPENED_TWICE, str(tmp_path)]
    grown = int(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    size = (tmp_path / FILE).stat().st_size
    assert size > 600_000
    assert grown > 0.7 * size if held else grown < 0.3 * size


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_vectors_are_read_without_what_lies_around_them(tmp_path: Path) -> None:
    """Else each candidate of an index larger than memory costs megabytes of reading."""
    index = make_faiss(tmp_path, clustered(200), IDS[:200], "rabitq")
    mapped = Path("/proc/self/smaps").read_text().split(f"{tmp_path / VECTORS}\n")[1]
    flags = next(line for line in mapped.splitlines() if line.startswith("VmFlags:"))
    assert "rr" in flags.split()  # the kernel's name for MADV_RANDOM
    assert len(index) == 200


@pytest.mark.parametrize("settings", [{"kind": "ivfpq", "pq_bits": 4}, {"kind": "rabitq"}])
def test_many_hits_come_from_lists_and_not_from_all_documents(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    count, many, asked_of_all, plain = 20_000, 3000, [], FaissIndex._search_all

    def counted(self: FaissIndex, queries: Any, rows: Any, *others: Any) -> Any:
        asked_of_all.append(len(rows))
        return plain(self, queries, rows, *others)

    monkeypatch.setattr(FaissIndex, "_search_all", counted)
    vectors, queries = clustered(count), clustered(20, 1)
    ids = [f"d{number}" for number in range(count)]
    index = make_faiss(tmp_path, vectors, ids, **settings)
    nprobe, nlist = (index.manifest.settings[name] for name in ("nprobe", "nlist"))
    assert nprobe * count / nlist < many, "the usual lists hold fewer documents than are asked for"
    for effort in (Effort(), Effort(nprobe=1)):  # as many as it takes, and more where too few were given
        found = open_index(tmp_path, effort=effort).search(queries, many)
        assert found.positions.shape == (20, many) and (found.positions >= 0).all()
    few = Allowed.of(np.arange(count) % 3 == 0)
    assert few.holds(open_index(tmp_path).search(queries, many, few).positions.ravel()).all()
    assert asked_of_all == [0, 0, 0]


def test_queries_of_another_dimension_or_not_finite(tmp_path: Path) -> None:
    index = make_faiss(tmp_path, clustered(50), IDS[:50], "hnsw")
    with pytest.raises(ModelError, match=r"dimension 16, the queries are 2 x 5: it was built with the model"):
        index.search(np.zeros((2, 5), np.float32), 3)
    with pytest.raises(ModelError, match="not finite"):
        index.search(np.full((1, DIM), np.inf, np.float32), 3)
    broken = clustered(50)
    broken[7, 3] = np.nan
    with pytest.raises(StorageError, match="not finite"):
        make_faiss(tmp_path / "broken", broken, IDS[:50], "hnsw")
    assert not list((tmp_path / "broken").iterdir())


@pytest.mark.parametrize("kind", TYPES)
def test_a_single_document(tmp_path: Path, kind: str) -> None:
    found = make_faiss(tmp_path, clustered(1), IDS[:1], kind).search(clustered(3, 1), 10)
    assert found.positions.tolist() == [[0]] * 3


def shape(count: int = 10_000, dim: int = 256, **settings: Any) -> Shape:
    return Shape.of(IndexConfig(vectors=Path("v"), output=Path("i"), **settings), count, dim)


def test_parameters_follow_the_size() -> None:
    assert [shape(count, type="ivfpq").settings["nlist"] for count in (1, 100, 10_000, 10**6)] == [1, 1, 156, 4096]
    assert [usual_pieces(dim, 8) for dim in (1, 7, 8, 256, 768, 4096)] == [1, 1, 2, 64, 128, 128]
    assert [usual_pieces(dim, 4) for dim in (1, 7, 8, 256, 768, 4096)] == [1, 1, 4, 128, 256, 256]
    assert shape(type="ivfpq", pq_bits=4).bytes_per_vector == shape(type="ivfpq", pq_bits=8).bytes_per_vector
    assert [shape(count, type="ivfpq").settings["pq_bits"] for count in (1, 100, 10_000)] == [1, 4, 8]
    assert shape(type="hnsw").bytes_per_vector == 4 * 256 + 8 * 32 + 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "ivfpq", "pq_m": 100}, "--pq-m: 100 does not divide the vectors' size, 256"),
        ({"type": "ivfpq", "pq_bits": 12, "count": 99}, "--pq-bits: 12 bits name 4096 centroids, there are 99 vectors"),
        ({"type": "rabitq", "nlist": 20_000}, "--nlist: 20000 lists for 10,000 vectors; give fewer"),
    ],
)
def test_parameters_that_do_not_fit_the_vectors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shape(**settings)
    assert caught.value.problems == (message,)


def test_settings_of_other_types_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        shape(type="hnsw", nlist=4, pq_m=2, k1=1.0, part_size=0, hnsw_m=1)
    assert caught.value.problems == (
        "--hnsw-m: must be 2 or more, got 1",
        "--part-size: must be 1 or more, got 0",
        "--k1: goes with --type bm25",
        "--pq-m: goes with --type ivfpq",
        "--nlist: goes with --type ivfpq or rabitq",
    )
    assert Effort(ef_search=3, nprobe=4, refine=2).unread_by(["flat", "hnsw"]) == [
        "--nprobe: goes with an index of type ivfpq or rabitq"
    ]


@pytest.mark.parametrize("kind", TYPES)
def test_a_cut_or_changed_file_is_an_error(tmp_path: Path, kind: str) -> None:
    make_faiss(tmp_path, clustered(COUNT), IDS, kind)
    for name in (FILE, *([] if kind == "hnsw" else [VECTORS])):
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data[:-9])
        with pytest.raises(StorageError, match=f"{name}: is damaged: has"):
            open_index(tmp_path)
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :])
        with pytest.raises(StorageError, match=f"{name}: is damaged: its SHA-256"):
            open_index(tmp_path, verify=True)
        path.write_bytes(data)


def test_another_index_under_the_name_is_an_error(tmp_path: Path) -> None:
    make_faiss(tmp_path / "a", clustered(COUNT), IDS, "rabitq")
    make_faiss(tmp_path / "b", clustered(COUNT), IDS, "ivfpq")
    (tmp_path / "a" / FILE).write_bytes((tmp_path / "b" / FILE).read_bytes())
    manifest = Manifest.read(tmp_path / "b")
    with pytest.raises(StorageError, match="does not fit its manifest; rebuild the index"):
        FaissIndex(tmp_path / "a", Manifest(**{**vars(manifest), "type": "rabitq"}))
    (tmp_path / "a" / FILE).write_bytes(b"IwPQ" + bytes(100))
    with pytest.raises(StorageError, match="is damaged, FAISS cannot read it"):
        FaissIndex(tmp_path / "a", replace(manifest, type="hnsw"))
    with pytest.raises(StorageError, match="is damaged: has 104 bytes"):
        FaissIndex(tmp_path / "a", manifest)


@pytest.mark.parametrize("kind", ["ivfpq", "rabitq"])
def test_codes_with_a_changed_bit_are_never_opened(kind: str, tmp_path: Path) -> None:
    """FAISS takes sizes and ids from them as they are, and so gigabytes, or documents that are none."""
    make_faiss(tmp_path, clustered(COUNT), IDS, kind)
    good = (tmp_path / FILE).read_bytes()
    for place in (10, len(good) // 2, len(good) - 5):
        (tmp_path / FILE).write_bytes(good[:place] + bytes([good[place] ^ 64]) + good[place + 1 :])
        with pytest.raises(StorageError, match="is damaged: its SHA-256"):
            open_index(tmp_path)


def small_index() -> Any:
    import faiss

    index = faiss.IndexFlatIP(4)
    index.add(np.ones((3, 4), np.float32))
    return index


def test_a_full_disk_is_told_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(written, "reserve", full)
        with pytest.raises(StorageError, match=r"i.faiss: needs \d+ bytes, .* are free: make room"):
            write_index(small_index(), tmp_path / "i.faiss")
    plain, calls = written._give, []

    def give(index: Any, take: Any) -> None:
        calls.append(take)
        plain(index, take if len(calls) == 1 else full)

    monkeypatch.setattr(written, "_give", give)
    with pytest.raises(StorageError, match="make room"):
        write_index(small_index(), tmp_path / "i.faiss")
    assert not list(tmp_path.iterdir())


def test_bytes_that_did_not_reach_the_disk_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = written._give, []

    def give(index: Any, take: Any) -> None:
        calls.append(take)
        plain(index, take if len(calls) == 1 else lambda chunk: take(bytes(len(chunk))))

    monkeypatch.setattr(written, "_give", give)
    with pytest.raises(StorageError, match="otherwise than FAISS gave it"):
        write_index(small_index(), tmp_path / "i.faiss")


def test_a_written_index_is_what_faiss_writes(tmp_path: Path) -> None:
    import faiss

    record = write_index(small_index(), tmp_path / "i.faiss")
    data = (tmp_path / "i.faiss").read_bytes()
    assert data == faiss.serialize_index(small_index()).tobytes()
    assert record == (len(data), hashlib.sha256(data).hexdigest())
    assert [path.name for path in tmp_path.iterdir()] == ["i.faiss"]
