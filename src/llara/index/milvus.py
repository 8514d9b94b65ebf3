"""Vectors in Milvus: a file path is Milvus Lite, an address is a cluster, and both go through one client.

The index folder holds the manifest and the ids; the vectors lie in a collection whose primary key is the position of a
document. The collection says which folder it belongs to, so that neither is taken for another. A token or password is
read from the environment variable MILVUS_TOKEN, and never written anywhere.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llara.encoding.arrays import Array
from llara.encoding.manifest import find_model, relative_path
from llara.errors import ConfigError, MissingExtra, StorageError
from llara.index.base import Allowed, Asks, Floats, Ids, Manifest, Positions, TopK, best_rows
from llara.index.flat import check_queries, exact_scores
from llara.index.parts import both, live_documents, read_deleted
from llara.progress import Progress

FILE = "milvus.db"  # of Milvus Lite, in the index folder, where no --uri is given
TOKEN = "MILVUS_TOKEN"  # name of the environment variable
TIMEOUT = 10.0  # seconds that an answer may take
PATIENCE = 600.0  # seconds that it may take to write rows, to make them durable, and to load a collection
MOST = 16_384  # hits that Milvus returns, and ids that it is asked for, at most
KEY, VECTOR = "position", "vector"
PROPERTY = "llara"  # of a collection: the folder that it belongs to
# Of a graph, where they are ours to set. Copies link to each other: a corpus with many takes more than is usual.
GRAPH = {"M": 32, "efConstruction": 200}
EF = 512  # candidates that a search keeps
_SPARE = 16  # hits fetched beyond top_k, so that equal ones stand in the order of their ids
_QUERIES = 64  # asked at once
_NAMED = 4096  # allowed documents that are named in a query; of more, the others are dropped from what was found
_MARGIN = 1e-6  # between scores that Milvus may have rounded apart
_BYTES = 8 << 20  # of vectors sent at once; Milvus takes 64 MB
Result = TypeVar("Result")


class MilvusIndex:
    """An index whose vectors lie in Milvus. Scores are what Milvus computes, in float32."""

    asks: Asks = "vectors"

    def __init__(self, folder: Path, manifest: Manifest, ids: Ids) -> None:
        self.manifest, self.ids = manifest, ids
        self.model = find_model(manifest.model_path, folder)
        self.dim = int(manifest.settings["dim"])
        self._server = Server(find_uri(manifest.settings["uri"], folder), folder)
        self._name = str(manifest.settings["collection"])
        self._kind = str(manifest.settings["milvus_index"])
        deleted = read_deleted(folder, manifest)
        rows = self._server.check(self._name, self.dim, manifest.settings["binding"])
        # A change that was stopped leaves rows behind that the manifest does not know, or no longer.
        self._extra = rows - (len(self) - len(deleted))
        if self._extra < 0:
            what = f"the collection {self._name} has lost {-self._extra:,} of its documents; build the index again"
            raise StorageError(folder, what)
        self._live = live_documents(deleted, len(self)) if len(deleted) else None

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: Floats, top_k: int, allowed: Allowed | None = None) -> TopK:
        """Returns the `top_k` best of the allowed documents for each query; `queries` is float32 [queries, dim].

        Raises:
            ConfigError: More hits than Milvus returns.
            ModelError: The queries have another dimension than the index.
            StorageError: Milvus does not answer.
        """
        queries = check_queries(queries, self.dim, self.origin)
        fits = both(allowed, self._live)
        top_k = min(top_k, len(self) if fits is None else fits.count)
        if top_k > MOST:
            raise ConfigError(f"--top-k: Milvus returns {MOST:,} hits at most, asked for {top_k:,}")
        if not len(queries) or not top_k:
            return TopK(np.empty((len(queries), top_k), np.float32), np.empty((len(queries), top_k), np.int64))
        parts = [
            self._search_block(queries[at : at + _QUERIES], top_k, fits) for at in range(0, len(queries), _QUERIES)
        ]
        return TopK(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def score(self, queries: Floats, positions: Sequence[Positions]) -> list[Floats]:
        """Returns the scores of given documents, per query int64 [n] to float32 [n], computed from their vectors.

        They differ from those of `search` in the last digits of float32 at most.
        """
        wanted = np.unique(np.concatenate([np.empty(0, np.int64), *positions]))
        vectors = self._server.vectors(self._name, wanted, self.dim)
        places = [np.searchsorted(wanted, each) for each in positions]
        return [exact_scores(vectors, query, each) for query, each in zip(queries, places, strict=True)]

    def stored(self, positions: Positions) -> Floats:
        """Returns the vectors of documents at rising positions, int64 [n] to float32 [n, dim]; zeros where one is gone.

        StorageError where Milvus does not answer.
        """
        return self._server.vectors(self._name, positions, self.dim)

    @property
    def origin(self) -> str:
        """Says which model the index was built with."""
        return f"it was built with the model {self.model}"

    def _search_block(self, queries: Floats, top_k: int, fits: Allowed | None) -> TopK:
        """Asks for more until the last hit kept is better than the last one found: equal ones are then all here.

        Where Milvus does not give enough, the documents are named to it.
        """
        if fits is not None and fits.count <= _NAMED:
            return self._search_named(queries, top_k, fits)
        most = min(MOST, len(self) + self._extra)
        limit = min(most, round(len(self) / (fits.count if fits else len(self)) * (top_k + _SPARE)) + self._extra)
        while True:
            scores, positions = self._server.search(self._name, queries, limit, "", self._kind)
            top = best_rows(*self._known(scores, positions, fits), self.ids, top_k)
            full = top.positions.shape[1] == top_k and bool((top.positions >= 0).all())
            if full and (limit == most or (top.scores[:, -1] > scores[:, -1] + _MARGIN).all()):
                return top
            if limit == most:
                return self._search_named(queries, top_k, fits or Allowed.of(np.ones(len(self), np.bool_)))
            limit = min(most, 4 * limit)

    def _search_named(self, queries: Floats, top_k: int, fits: Allowed) -> TopK:
        """Searches the allowed documents alone, so many at a time as can be named."""
        named = np.flatnonzero(fits.mask(0, len(self)))
        limit = min(MOST, _NAMED)
        parts = []
        for start in range(0, len(named), _NAMED):
            condition = f"{KEY} in {named[start : start + _NAMED].tolist()}"
            parts.append(self._known(*self._server.search(self._name, queries, limit, condition, self._kind), fits))
        scores, positions = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        return best_rows(scores, positions, self.ids, top_k)

    def _known(self, scores: Floats, positions: Positions, fits: Allowed | None) -> tuple[Floats, Positions]:
        """Leaves out hits that are not allowed, or that the manifest does not know."""
        good = (positions >= 0) & (positions < len(self))
        if fits is not None:
            good &= fits.holds(np.where(good, positions, 0))
        return np.where(good, scores, -np.inf).astype(np.float32), np.where(good, positions, -1)


class Server:
    """What is asked of Milvus. Whatever it answers with that is no answer is a StorageError that names its address."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder = uri, folder
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise MissingExtra("an index of type milvus", "milvus") from error
        if not is_remote(uri):
            check_path(uri)
        for name in ("pymilvus", "milvus_lite", "grpc"):
            # What they log, tracebacks and all, is in the error that follows.
            logging.getLogger(name).setLevel(logging.CRITICAL)
        given = {"token": os.environ[TOKEN]} if os.environ.get(TOKEN) else {}
        self._client: Any = self._ask(lambda: MilvusClient(uri=uri, timeout=TIMEOUT, **given))

    def check(self, name: str, dim: int, binding: str) -> int:
        """Returns how many rows a collection has; StorageError where it is not that of the index folder."""
        if not self._ask(lambda: self._client.has_collection(name, timeout=TIMEOUT)):
            raise StorageError(self.folder, f"{self.uri} has no collection {name}; build the index again")
        described = self._ask(lambda: self._client.describe_collection(name, timeout=TIMEOUT))
        found = _described(described)
        if found.get("binding") != binding:
            raise StorageError(self.folder, f"the collection {name} at {self.uri} was not made for this index")
        size = next((int(f["params"]["dim"]) for f in described["fields"] if f["name"] == VECTOR), 0)
        if size != dim:
            what = f"the collection {name} at {self.uri} holds vectors of dimension {size}, the index of {dim}"
            raise StorageError(self.folder, what)
        self._ask(lambda: self._client.load_collection(name, timeout=PATIENCE))
        return self.count(name)

    def count(self, name: str) -> int:
        """Returns how many rows a collection has, those that are on their way included."""
        asked = {"output_fields": ["count(*)"], "timeout": TIMEOUT}
        (row,) = self._ask(lambda: self._client.query(name, filter="", **asked))
        return int(row["count(*)"])

    def create(self, name: str, dim: int, binding: str, owner: str, kind: str) -> None:
        """Makes an empty collection; one that a build of the same folder left behind is dropped first."""
        from pymilvus import DataType, MilvusClient

        if self._ask(lambda: self._client.has_collection(name, timeout=TIMEOUT)):
            described = self._ask(lambda: self._client.describe_collection(name, timeout=TIMEOUT))
            if _described(described).get("owner") != owner:
                what = f"{self.uri} has a collection {name} already, which another index or program made"
                raise StorageError(self.folder, f"{what}; give another --collection")
            self._ask(lambda: self._client.drop_collection(name, timeout=TIMEOUT))
        said = json.dumps({"binding": binding, "owner": owner})
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=said)
        schema.add_field(KEY, DataType.INT64, is_primary=True)
        schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=dim)
        searched = MilvusClient.prepare_index_params()
        searched.add_index(VECTOR, index_type=kind, metric_type="IP", params=GRAPH if self._takes_graph(kind) else {})
        # Milvus Lite keeps no description, and a server may keep no property that it does not know.
        given = {"schema": schema, "index_params": searched, "properties": {PROPERTY: said}}
        given |= {"consistency_level": "Strong", "timeout": TIMEOUT}  # what was written is found at once
        self._ask(lambda: self._client.create_collection(name, **given))

    def insert(self, name: str, start: int, vectors: Floats) -> None:
        """Writes rows from a position on; those that are there already are written anew."""
        rows = [{KEY: start + row, VECTOR: vector} for row, vector in enumerate(vectors)]
        self._ask(lambda: self._client.upsert(name, rows, timeout=PATIENCE))

    def finish(self, name: str) -> None:
        """Makes what was written durable, and loads it."""
        self._ask(lambda: self._client.flush(name, timeout=PATIENCE))
        self._ask(lambda: self._client.load_collection(name, timeout=PATIENCE))

    def delete(self, name: str, positions: Positions) -> None:
        """Deletes rows; those that are gone already are passed over."""
        for start in range(0, len(positions), _NAMED):
            some = positions[start : start + _NAMED].tolist()
            self._ask(lambda some=some: self._client.delete(name, ids=some, timeout=PATIENCE))  # type: ignore[misc]
        self._ask(lambda: self._client.flush(name, timeout=PATIENCE))

    def _takes_graph(self, kind: str) -> bool:
        """Tells whether the parameters of a graph are ours to set: those of a cluster's AUTOINDEX are not."""
        return kind == "HNSW" or (kind == "AUTOINDEX" and "://" not in self.uri)

    def search(self, name: str, queries: Floats, limit: int, condition: str, kind: str) -> tuple[Floats, Positions]:
        """Returns scores and positions, [queries, limit], rows filled up with -inf and -1."""
        effort = {"ef": max(EF, limit)} if self._takes_graph(kind) else {}
        how = {"metric_type": "IP", "params": effort}
        given = {"anns_field": VECTOR, "search_params": how, "filter": condition, "timeout": TIMEOUT}
        rows = self._ask(lambda: self._client.search(name, data=queries.tolist(), limit=limit, **given))
        scores = np.full((len(queries), limit), -np.inf, np.float32)
        positions = np.full((len(queries), limit), -1, np.int64)
        for row, hits in enumerate(rows):
            scores[row, : len(hits)] = [hit["distance"] for hit in hits]
            positions[row, : len(hits)] = [hit[KEY] for hit in hits]
        return scores, positions

    def vectors(self, name: str, positions: Positions, dim: int) -> Floats:
        """Returns the vectors of documents at rising positions, float32 [positions, dim]."""
        found = np.zeros((len(positions), dim), np.float32)
        for start in range(0, len(positions), _NAMED):
            some = positions[start : start + _NAMED]
            asked = {"ids": some.tolist(), "output_fields": [VECTOR], "timeout": TIMEOUT}
            rows = self._ask(lambda asked=asked: self._client.get(name, **asked))  # type: ignore[misc]
            for row in rows:
                found[start + int(np.searchsorted(some, row[KEY]))] = row[VECTOR]
        return found

    def _ask(self, call: Callable[[], Result]) -> Result:
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        try:
            return call()
        except (MilvusException, RpcError, OSError, RuntimeError) as error:
            said = " ".join(str(getattr(error, "message", "") or error).split())
            advice = (
                f"see whether it runs, and whether {TOKEN} is right" if is_remote(self.uri) else "see what holds it"
            )
            raise StorageError(self.uri, f"Milvus does not answer as it should: {said}; {advice}") from error


def write_milvus(
    folder: Path, shards: Iterable[Array], place: dict[str, Any], dim: int, start: int, shown: Progress
) -> dict[str, Any]:
    """Writes vectors into a collection, from the position `start` on; returns the settings for the manifest.

    `place` is what `choose_place` returned, or the settings of the index that is added to. With a `start` of 0 the
    collection is made first.
    """
    server = Server(find_uri(place["uri"], folder), folder)
    name, position = place["collection"], start
    if not start:
        server.create(name, dim, place["binding"], place["owner"], place["milvus_index"])
    for block in _blocks(shards, max(1, _BYTES // (4 * dim))):
        if not np.isfinite(block).all():
            raise StorageError(folder, "the vectors hold values that are not finite; encode the corpus again")
        server.insert(name, position, np.asarray(block, np.float32))
        position += len(block)
        shown.advance(len(block))
    server.finish(name)
    if server.count(name) < position - start:
        raise StorageError(server.uri, f"Milvus did not keep all rows of the collection {name}; build the index again")
    return {**place, "dim": dim}


def choose_place(folder: Path, uri: str | None, collection: str | None, kind: str, source: str) -> dict[str, Any]:
    """Returns where the vectors of a new index go, as its manifest records it.

    A path is recorded as it is reached from the folder. Without a name, the collection has one of its own for each
    folder.
    """
    owner = hashlib.sha256(f"{platform.node()}\n{folder.resolve()}".encode()).hexdigest()[:16]
    if uri is None:
        uri = FILE
    elif not is_remote(uri):
        uri = relative_path(Path(uri), folder)
    binding = hashlib.sha256(f"{source}\n{owner}".encode()).hexdigest()[:16]
    name = collection or f"llara_{owner}"
    return {"uri": uri, "collection": name, "binding": binding, "owner": owner, "milvus_index": kind}


def delete_from_milvus(folder: Path, manifest: Manifest, positions: Positions) -> None:
    """Deletes the rows of documents."""
    server = Server(find_uri(manifest.settings["uri"], folder), folder)
    server.delete(str(manifest.settings["collection"]), positions)


def is_remote(uri: str) -> bool:
    """Tells the address of a cluster from a path."""
    return "://" in uri


def check_uri(uri: str, folder: Path) -> None:
    """Refuses an address that does not answer, or a path that does not fit, for the index in `folder`."""
    if is_remote(uri):
        Server(uri, folder)
    else:
        check_path(uri)


def check_path(uri: str) -> None:
    """Refuses a path where Milvus Lite can keep nothing, or that holds something else: it keeps a folder there."""
    path = Path(uri)
    if not path.parent.is_dir():
        raise StorageError(path.parent, "no such folder; --uri is a name for Milvus Lite in a folder that is there")
    if path.is_dir() and ((path / "collections").is_dir() or not any(path.iterdir())):
        return
    if path.exists():
        what = "is a folder with other files" if path.is_dir() else "is a file"
        raise StorageError(path, f"{what}, and no database of Milvus Lite; give another --uri")


def find_uri(recorded: str, folder: Path) -> str:
    """Returns the address that a manifest in `folder` recorded."""
    return recorded if is_remote(recorded) else os.path.normpath(folder.resolve() / recorded)


def _described(collection: dict[str, Any]) -> dict[str, Any]:
    try:
        said = json.loads((collection.get("properties") or {}).get(PROPERTY) or collection.get("description") or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _blocks(shards: Iterable[Array], rows: int) -> Iterator[Array]:
    for shard in shards:
        for start in range(0, len(shard), rows):
            yield shard[start : start + rows]
