"""Writes an encoded corpus: shard by shard, each published whole, each made once.

A shard is a fixed range of input rows and is encoded by itself, so its bytes depend neither on where a run was stopped
nor on what ran before. A run over a folder that exists reads the corpus again, compares the digest of every finished
shard's rows, and makes only what is missing; rows behind the last shard become new shards.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llara.data import Row
from llara.data.seen import FirstSeen, place_of
from llara.encoding.documents import read_ids, write_document_files
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
from llara.encoding.numbers import Encode, Numbers
from llara.encoding.vectors import Vectors as Vectors  # what writes a folder and what reads it come from one place
from llara.encoding.vectors import verify_vectors as verify_vectors
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
    encode: Encode,
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
        encode: Called once per new shard with its accepted documents (one or more); returns float [documents, dim], and
            where `identity` has settings of sparse vectors a pair of that and the documents' terms; where it says that
            long documents are cut, what `llara.encoding.numbers.Encoded` says.
        identity: JSON values that decide the vectors; dim, vector_dtype and shard_size are added. Under `sparse` those
            of sparse vectors, `vocabulary` among them, where such are wanted.
        dim: Size of a vector.
        vector_dtype: float32, float16 or int8, the type on disk.
        shard_size: Input rows per shard, bad rows included.
        progress: Told of rows found done and of rejected rows; `encode` counts the documents.
        about: JSON values to keep in the manifest that decide nothing, such as the path of the model.
        extras: Name and content of further files to keep in the folder, such as config.toml.
        verify: Recompute the checksums of finished shards, not only their sizes.

    Raises:
        StorageError: Full disk, damage, a second writer, another configuration's folder, or a corpus whose finished
            part has changed.
        DataError: No row can be used; `rejected.jsonl` says why, and a mended corpus may follow.
        ModelError: `encode` returned NaN or infinity; nothing of that shard is published.
    """
    decides = {**identity, "dim": dim, "vector_dtype": vector_dtype, "shard_size": shard_size}
    job = _Job(
        folder=output,
        kind="vectors",
        identity=decides,
        shard_size=shard_size,
        numbers=Numbers(encode, dim, vector_dtype, identity.get(SPARSE, {}).get("vocabulary"), CUT in identity),
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


class _Writer:
    """One run over one folder."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.folder = job.folder
        self.entries: list[dict[str, Any]] = []
        self.made = 0
        self.complete: dict[str, Any] | None = None  # the manifest as found, where the folder was complete

    def run(self, rows: Iterable[Row]) -> VectorsSummary:
        with FolderLock(self.folder):
            self._claim()
            with FirstSeen(self.folder / WORK) as seen:
                self._walk(iter(rows), seen)
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

    def _walk(self, rows: Iterator[Row], seen: FirstSeen) -> None:
        start = 0
        for number in itertools.count():
            name = shard_name(number)
            known = self._known(name, start)
            count = known[0].end - start if known else self.job.shard_size
            batch = list(itertools.islice(rows, count))
            if known:
                self._recognise(known[0], batch, seen)
            elif batch:
                known = self._make(name, start, batch, seen)
            else:
                return self._refuse_shrunk(number, start)
            shard, digest = known
            self.entries.append(_entry(shard, digest))
            start = shard.end

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
            self.job.progress.start_at(shard.end)

    def _make(self, name: str, start: int, batch: Sequence[Row], seen: FirstSeen) -> tuple[Shard, str]:
        if self.complete:
            self._open()
        documents, rejected = sift_rows(batch, start, seen)
        if self.job.progress:
            # Where documents are encoded, `encode` counts them as it goes.
            self.job.progress.advance(len(rejected) if self.job.numbers else len(batch))
        files: dict[str, FileRecord] = {}
        if self.job.numbers:
            files |= self.job.numbers.write(self.folder, name, documents)
        files |= write_document_files(self.folder, name, documents)
        shard = Shard(name, start, start + len(batch), len(documents), digest_rows(batch), rejected, files)
        self.made += 1
        return shard, write_sidecar(self.folder, shard)

    def _refuse_shrunk(self, number: int, rows: int) -> None:
        behind = sorted(path.name for path in self.folder.glob("shard-*.json") if path.stem >= shard_name(number))
        if behind:
            raise _changed(self.folder, f"it ends after {rows:,} rows, and {behind[0]} holds later ones")

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


def _entry(shard: Shard, digest: str) -> dict[str, Any]:
    counts = {"end": shard.end, "documents": shard.documents, "rejected": len(shard.rejected)}
    return {"name": shard.name, **counts, "source": shard.source, "digest": digest}


def _changed(folder: Path, what: str) -> StorageError:
    advice = "a corpus may only grow at its end; choose another --output, or delete this folder to start again"
    return StorageError(folder, f"the corpus has changed since: {what}; {advice}")
