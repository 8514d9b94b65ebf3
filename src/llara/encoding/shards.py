"""Writes an encoded corpus: shard by shard, each published whole, each made once. `vectors.py` reads it.

A shard is a fixed range of input rows and is encoded by itself, so its bytes depend neither on where a run was stopped
nor on what ran before or beside it. Several may be with an engine at once, and they are published as they come back. A
run over a folder that exists reads the corpus again, compares the digest of every finished
shard's rows, and makes only what is missing; rows behind the last shard become new shards.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from llara.data import Row
from llara.data.seen import FirstSeen, place_of
from llara.encoding.documents import read_ids, write_document_files
from llara.encoding.engine import Encode, Engine, Found, Inline, Job
from llara.encoding.intake import digest_rows, sift_rows
from llara.encoding.manifest import (
    CUT,
    FORMAT,
    MANIFEST,
    REJECTED,
    SPARSE,
    Shard,
    check_shard,
    corpus_digest,
    read_sealed,
    read_sidecar,
    shard_name,
    write_sealed,
    write_sidecar,
)
from llara.encoding.numbers import Numbers
from llara.encoding.vectors import Vectors, verify_vectors
from llara.errors import DataError, StorageError
from llara.files import (
    FileRecord,
    FolderLock,
    disk_errors,
    foreign_folder,
    is_unclaimed,
    refuse_differences,
    remove_leftovers,
    write_atomic,
)
from llara.progress import Progress
from llara.records import Document

__all__ = ["Vectors", "VectorsSummary", "verify_vectors", "write_documents", "write_vectors"]

WORK = ".work"  # scratch of a running job; removed at its end


class VectorsSummary(NamedTuple):
    """What a folder holds after a run; `reused_shards` of the shards were found finished."""

    shards: int
    documents: int
    rejected: int
    reused_shards: int


@dataclass(kw_only=True)
class _Job:
    """What one run was asked for."""

    folder: Path
    kind: str
    identity: dict[str, Any]
    shard_size: int
    numbers: Numbers | None = None
    progress: Progress | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, bytes] = field(default_factory=dict)
    verify: bool = False

    def opening(self) -> dict[str, Any]:
        """The manifest of a folder that is not complete."""
        content = {"kind": self.kind, "state": "encoding", "identity": self.identity, "about": dict(self.about)}
        return dict(json.loads(json.dumps({"format": FORMAT, **content})))


def write_vectors(
    output: Path,
    rows: Iterable[Row],
    encode: Encode | Engine,
    identity: Mapping[str, Any],
    dim: int,
    vector_dtype: str,
    shard_size: int,
    progress: Progress | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    extras: Mapping[str, bytes] | None = None,
    verify: bool = False,
) -> VectorsSummary:
    """Makes or completes a vectors folder.

    Args:
        output: The folder; it is created, or completed where the same configuration made it.
        rows: All input rows of the corpus, from the first, also those of finished shards.
        encode: An engine, or a function that is called once per new shard with its accepted documents (one or more).
            Gives float [documents, dim] per shard, and where `identity` has settings of sparse vectors a pair of that
            and the documents' terms; where it says that long documents are cut, what `Encoded` says.
        identity: JSON values that decide the vectors; dim, vector_dtype and shard_size are added. Under `sparse` those
            of sparse vectors, `vocabulary` among them, where such are wanted.
        dim: Size of a vector.
        vector_dtype: float32, float16 or int8, the type on disk.
        shard_size: Input rows per shard, bad rows included.
        progress: Told of rows found done and of rejected rows; an engine, or the function, counts the documents.
        about: JSON values to keep in the manifest that decide nothing, such as the path of the model.
        extras: Name and content of further files to keep in the folder, such as config.toml.
        verify: Recompute the checksums of finished shards, not only their sizes.

    Raises:
        StorageError: Full disk, damage, a second writer, another configuration's folder, or a corpus whose finished
            part has changed.
        DataError: No row can be used; `rejected.jsonl` says why, and a mended corpus may follow.
        ModelError: `encode` returned NaN or infinity; nothing of that shard is published.
        LlaraError: What else `encode` raises.
    """
    engine = Inline(encode) if callable(encode) else encode
    decides = {**identity, "dim": dim, "vector_dtype": vector_dtype, "shard_size": shard_size}
    job = _Job(
        folder=output,
        kind="vectors",
        identity=decides,
        shard_size=shard_size,
        numbers=Numbers(engine, dim, vector_dtype, identity.get(SPARSE, {}).get("vocabulary"), CUT in identity),
        progress=progress,
        about=about or {},
        extras=extras or {},
        verify=verify,
    )
    return _Writer(job).run(rows)


def write_documents(
    output: Path,
    rows: Iterable[Row],
    shard_size: int = 10_000,
    progress: Progress | None = None,
    *,
    verify: bool = False,
) -> VectorsSummary:
    """Makes or completes a folder with the document store alone; see `write_vectors`, whose rules all hold."""
    identity = {"shard_size": shard_size}
    job = _Job(
        folder=output, kind="documents", identity=identity, shard_size=shard_size, progress=progress, verify=verify
    )
    return _Writer(job).run(rows)


class _Pending(NamedTuple):
    """A shard that is to be made: its rows, sifted; `source` is the digest of the raw ones."""

    name: str
    start: int
    end: int
    documents: list[Document]
    rejected: list[dict[str, Any]]
    source: str


class _Writer:
    """One run over one folder."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.folder = job.folder
        self.found: dict[int, dict[str, Any]] = {}  # the manifest's entries by their first row, in any order
        self.made = 0
        self.complete: dict[str, Any] | None = None  # the manifest as found, where the folder was complete

    def run(self, rows: Iterable[Row]) -> VectorsSummary:
        with FolderLock(self.folder):
            self._claim()
            with FirstSeen(self.folder / WORK) as seen:
                self._make(self._walk(iter(rows), seen))
            return self._finish()

    def _claim(self) -> None:
        path, opening = self.folder / MANIFEST, self.job.opening()
        if not path.exists():
            if not is_unclaimed(self.folder):
                raise foreign_folder(self.folder)
            remove_leftovers(self.folder)
            return self._open()
        found = read_sealed(path)
        if found["kind"] != self.job.kind:
            raise StorageError(self.folder, f"holds {found['kind']}, not {self.job.kind}; choose another --output")
        if holds := self._holds_documents(found):
            refuse_differences(self.folder, found["identity"], opening["identity"])
        else:  # a corrected command or corpus may follow one that failed: no work is at stake
            self._remove_shards(kept=set())
        remove_leftovers(self.folder)
        if holds and found["state"] == "complete":
            self.complete = found
        else:
            self._open()

    def _holds_documents(self, found: Mapping[str, Any]) -> bool:
        if found["state"] == "complete":
            return bool(found["documents"])
        names = sorted(path.stem for path in self.folder.glob("shard-*.json"))
        return any(read_sidecar(self.folder, name)[0].documents for name in names)

    def _open(self) -> None:
        """Says in the folder that it is being written; called before the first change to a complete one."""
        self.complete = None
        write_sealed(self.folder / MANIFEST, self.job.opening())
        for name, content in self.job.extras.items():
            write_atomic(self.folder / name, content)

    def _walk(self, rows: Iterator[Row], seen: FirstSeen) -> Iterator[_Pending]:
        """Yields the shards that are to be made, in order, and takes in the finished ones on the way."""
        start = 0
        for number in itertools.count():
            name = shard_name(number)
            known = self._known(name, start)
            end = known[0].end if known else start + self.job.shard_size
            batch = list(itertools.islice(rows, end - start))
            if known:
                self._recognise(known[0], batch, seen)
                self.found[start] = _entry(*known)
            elif batch:
                end = start + len(batch)
                documents, rejected = sift_rows(batch, start, seen)
                source = digest_rows(batch)
                del batch  # the documents hold all that is still needed
                yield _Pending(name, start, end, documents, rejected, source)
            else:
                return self._refuse_shrunk(number, start)
            start = end

    def _make(self, shards: Iterator[_Pending]) -> None:
        """Makes the shards, as many at once as the engine takes, and publishes each when it comes back."""
        numbers, waiting = self.job.numbers, dict[str, _Pending]()

        def jobs() -> Iterator[Job]:
            assert numbers is not None
            for shard in self._begun(shards):
                numbers.check_room(self.folder, map(_size, [*waiting.values(), shard]))
                if shard.documents:
                    waiting[shard.name] = shard
                    yield Job(shard.name, shard.documents)
                else:
                    self._publish(shard, numbers.nothing())

        if numbers is None:
            for shard in self._begun(shards):
                self._publish(shard)
        else:
            for name, found in numbers.engine.encode(jobs(), self._count):
                self._publish(waiting.pop(name), found)
            assert not waiting, f"the engine gave no numbers for {', '.join(waiting)}"

    def _begun(self, shards: Iterator[_Pending]) -> Iterator[_Pending]:
        for shard in shards:
            if self.complete:
                self._open()
            # Where documents are encoded, the engine counts them as it goes.
            self._count(len(shard.rejected) if self.job.numbers else shard.end - shard.start)
            yield shard

    def _count(self, rows: int) -> None:
        if self.job.progress:
            self.job.progress.advance(rows)

    def _publish(self, pending: _Pending, found: Found | None = None) -> None:
        name, start, end, documents, rejected, source = pending
        files: dict[str, FileRecord] = {}
        if self.job.numbers and found is not None:
            files |= self.job.numbers.write(self.folder, name, documents, found)
        files |= write_document_files(self.folder, name, documents)
        shard = Shard(name, start, end, len(documents), source, rejected, files)
        self.found[start] = _entry(shard, write_sidecar(self.folder, shard))
        self.made += 1

    def _known(self, name: str, start: int) -> tuple[Shard, str] | None:
        """Returns a finished shard and the digest of its sidecar, or None where it is still to be made."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        shard, digest = read_sidecar(self.folder, name)
        if shard.start != start:
            raise StorageError(path, f"is out of place: starts at row {shard.start}, not {start}; delete the folder")
        for error in check_shard(self.folder, shard, full=self.job.verify):
            raise error
        return shard, digest

    def _recognise(self, shard: Shard, batch: Sequence[Row], seen: FirstSeen) -> None:
        """Makes sure that a finished shard was made from these rows, and enters its ids into the table."""
        if len(batch) < shard.end - shard.start or digest_rows(batch) != shard.source:
            where = f"{place_of(batch[0])} to {place_of(batch[-1])}" if batch else "no longer there"
            what = f"rows {shard.start + 1:,} to {shard.end:,} ({where}) are not those that {shard.name} was made from"
            raise _changed(self.folder, what)
        rejected = {entry["row"] for entry in shard.rejected}
        places = [place_of(row) for number, row in enumerate(batch, shard.start + 1) if number not in rejected]
        seen.add_all(list(zip(read_ids(self.folder, shard), places, strict=True)))
        if self.job.progress:
            self.job.progress.skip(shard.end - shard.start)

    def _refuse_shrunk(self, number: int, rows: int) -> None:
        behind = sorted(path.name for path in self.folder.glob("shard-*.json") if path.stem >= shard_name(number))
        if behind:
            raise _changed(self.folder, f"it ends after {rows:,} rows, and {behind[0]} holds later ones")

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The manifest's entries, in the order of the shards; asked for when all are there."""
        return [self.found[start] for start in sorted(self.found)]

    def _finish(self) -> VectorsSummary:
        summary = VectorsSummary(
            len(self.entries),
            sum(entry["documents"] for entry in self.entries),
            sum(entry["rejected"] for entry in self.entries),
            len(self.entries) - self.made,
        )
        if self.complete and self._is_current(self.complete):
            return summary
        if self.complete:
            self._open()
        # Shards that a run began over a longer corpus and never finished.
        self._remove_shards(kept={entry["name"] for entry in self.entries})
        files = {name: write_atomic(self.folder / name, content) for name, content in self.job.extras.items()}
        files[REJECTED] = write_atomic(self.folder / REJECTED, self._rejected_lines())
        if not summary.documents:
            raise self._nothing_usable(summary.rejected)
        totals = {"documents": summary.documents, "rejected": summary.rejected, "rows": self.entries[-1]["end"]}
        content = {"shards": self.entries, "files": {name: record._asdict() for name, record in files.items()}}
        state = {"state": "complete", "corpus": corpus_digest(self.entries)}
        write_sealed(self.folder / MANIFEST, {**self.job.opening(), **state, **totals, **content})
        return summary

    def _is_current(self, manifest: Mapping[str, Any]) -> bool:
        """Tells whether a complete folder is what this run would leave, so that nothing needs writing."""
        if manifest["shards"] != self.entries or manifest["about"] != self.job.opening()["about"]:
            return False
        wanted = {name: FileRecord(len(c), hashlib.sha256(c).hexdigest()) for name, c in self.job.extras.items()}
        found = {name: FileRecord(**record) for name, record in manifest["files"].items()}
        if {name: found[name] for name in found if name != REJECTED} != wanted:
            return False
        paths = [self.folder / name for name in found]
        return all(path.is_file() and path.stat().st_size == found[path.name].bytes for path in paths)

    def _rejected_lines(self) -> Iterator[bytes]:
        for entry in self.entries:
            for rejected in read_sidecar(self.folder, entry["name"])[0].rejected if entry["rejected"] else ():
                line = json.dumps(rejected, sort_keys=True, ensure_ascii=False)
                yield line.encode("utf-8", "surrogatepass") + b"\n"

    def _nothing_usable(self, rows: int) -> DataError:
        first = read_sidecar(self.folder, self.entries[0]["name"])[0].rejected[0]
        what = f"of {rows:,}; the first: {first['file']}:{first['line']}: {first['reason']}"
        advice = "mend the corpus, then run the same command again"
        return DataError(self.folder / REJECTED, None, f"says why no row can be used, {what}; {advice}")

    def _remove_shards(self, kept: set[str]) -> None:
        with disk_errors(self.folder):
            # A sidecar vouches for the other files of its shard, so it is the first to go.
            for path in sorted(self.folder.glob("shard-*"), key=lambda path: path.suffix != ".json"):
                if path.name.partition(".")[0] not in kept:
                    path.unlink()


def _size(shard: _Pending) -> int:
    return len(shard.documents)


def _entry(shard: Shard, digest: str) -> dict[str, Any]:
    counts = {"end": shard.end, "documents": shard.documents, "rejected": len(shard.rejected)}
    return {"name": shard.name, **counts, "source": shard.source, "digest": digest}


def _changed(folder: Path, what: str) -> StorageError:
    advice = "a corpus may only grow at its end; choose another --output, or delete this folder to start again"
    return StorageError(folder, f"the corpus has changed since: {what}; {advice}")
