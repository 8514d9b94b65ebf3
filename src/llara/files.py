"""How files and folders are published, checked and locked.

A file appears under its name only when it is whole: temporary name in the same folder, space reserved, written,
flushed, synced, size checked, renamed, folder synced. So a file that may be memory-mapped is never truncated in place,
and a reader sees the old file or the new one. What a system cannot promise is listed by `durability_notes`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from llara.config import JobConfig, to_toml
from llara.errors import ConfigError, StorageError

TEMPORARY = ".tmp-"
LOCK = ".lock"
IDENTITY = "identity.json"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a file system answers when it lacks a call, as opposed to when the call failed.
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.ENOTTY)
_notes: dict[str, None] = {}


class FileRecord(NamedTuple):
    """What is recorded about a published file: its size in bytes and its SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


def durability_notes(*, of_system: bool = True) -> list[str]:
    """Returns which promises are weaker on this system, one sentence each; empty on Linux with a local file system.

    File systems answer only when used, so the list may grow after something was written. Without `of_system` it is
    what they answered in this process, and not what holds on all of the system.
    """
    notes = list(_notes)
    if of_system and not hasattr(os, "posix_fallocate"):
        notes.append("no posix_fallocate: a full disk is noticed while writing, not before")
    if of_system and sys.platform == "darwin":
        notes.append("macOS: fsync does not empty the drive's own cache, so a power cut may lose the last files")
    return notes


@contextlib.contextmanager
def disk_errors(path: Path, needs: int | None = None) -> Iterator[None]:
    """Turns an `OSError` inside the block into a `StorageError` that names `path`; `needs` is in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise StorageError(path, f"{error.strerror or error}") from error
        wanted = "more space" if needs is None else f"{needs:,} bytes"
        advice = "make room or choose another --output; the same command then goes on where it stopped"
        if error.errno == errno.EFBIG:
            advice = "the file system or a limit (ulimit -f) does not allow a file of that size"
        raise StorageError(path, f"needs {wanted}, {free_bytes(path.parent):,} are free: {advice}") from error


def confined(folder: Path, name: object) -> Path:
    """Returns the path of a file that a record names, which must be a plain name inside `folder`.

    A name from a JSON file may be anything: one that would lead elsewhere, or is none, is a `StorageError`.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise StorageError(folder, f"is damaged: a record in it names {name!r}, which is no file name")
    return folder / name


def free_bytes(folder: Path) -> int:
    """Returns the bytes that this user can still write below `folder`; 0 where that cannot be told."""
    try:
        state = os.statvfs(folder)
    except OSError:
        return 0
    return state.f_bavail * state.f_frsize


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits; a file that cannot be read is a `StorageError`."""
    with disk_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, chunks: bytes | Iterable[bytes | memoryview], size: int | None = None) -> FileRecord:
    """Publishes a file whole or not at all, and returns its record.

    `size` is the sum of the chunks in bytes where the caller knows it: that much space is reserved before writing.
    A full disk, a quota or a file size limit is a `StorageError` with the path and the space needed; so is a path where
    a folder, a device or a pipe stands, which the rename would replace.
    """
    if isinstance(chunks, bytes):
        chunks, size = (chunks,), len(chunks)
    _refuse_special(path)
    temporary = temporary_path(path)
    written = 0
    try:
        with disk_errors(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path, size), temporary.open("wb") as file:
            if size:
                reserve(file.fileno(), size)
            digest = hashlib.sha256()
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                written += memoryview(chunk).nbytes
            file.flush()
            os.fsync(file.fileno())
            _check_written(path, written, size, os.fstat(file.fileno()).st_size)
        with disk_errors(path, size):
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # whatever went wrong above is what the user must hear about
            temporary.unlink(missing_ok=True)
    return FileRecord(written, digest.hexdigest())


def check_output(path: Path, inputs: Iterable[Path], flag: str = "--output") -> None:
    """Raises, before any work, ConfigError where `path` (of `flag`) is an input, StorageError where no file can be."""
    _refuse_special(path)
    for each in inputs:
        # Of a collection, the files in its folder; a run may lie beside them.
        parts = (part for part in each.rglob("*") if part.suffix in (".gz", ".jsonl", ".tsv"))
        if any(path.resolve() == given.resolve() for given in (each, *parts)):
            raise ConfigError(f"{flag}: {path} is also an input; give another name")


def temporary_path(path: Path) -> Path:
    """Returns the name under which `path` is written before it is published; left-overs start with `.tmp-`."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def publish_file(staged: Path, final: Path) -> FileRecord:
    """Publishes a file that another library wrote under `temporary_path(final)`; returns its record.

    The caller checks beforehand that the library wrote all of it: not every one reports a full disk.
    """
    with disk_errors(final), staged.open("rb") as file:
        os.fsync(file.fileno())
        record = FileRecord(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
    with disk_errors(final):
        staged.replace(final)
        sync_folder(final.parent)
    return record


def publish_folder(staged: Path, final: Path) -> None:
    """Publishes a folder on the same file system in one step: syncs all that is in it, renames it, syncs the parent.

    A `final` that exists already and is not empty is a `StorageError`; nothing is replaced.
    """
    with disk_errors(final):
        for root, _, names in os.walk(staged):
            for name in names:
                with (Path(root) / name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(root))
        if final.is_dir() and any(final.iterdir()):
            raise StorageError(final, "exists already and is not empty; delete it or choose another --output")
        staged.rename(final)
        sync_folder(final.parent)


def write_json_atomic(path: Path, value: Any) -> FileRecord:
    """Publishes JSON with sorted keys, so that equal values give equal bytes."""
    return write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Returns the one spelling in which this package writes a JSON file."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file; a missing or broken one is a `StorageError` that names it."""
    return parse_json(path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file; one that is missing or cannot be read is a `StorageError`."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise StorageError(path, "is missing") from error
    except OSError as error:
        raise StorageError(path, f"{error.strerror or error}") from error


def parse_json(path: Path, raw: bytes) -> Any:
    """Returns the value of JSON text that was read from `path`; broken text is a `StorageError` that names it."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StorageError(path, f"is damaged: not valid JSON ({error})") from error


def check_file(path: Path, record: FileRecord, *, full: bool) -> None:
    """Compares a file with its record: the size always, the SHA-256 where `full`. A difference is a `StorageError`."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise StorageError(path, "is missing") from error
    except OSError as error:
        raise StorageError(path, f"{error.strerror or error}") from error
    if size != record.bytes:
        raise StorageError(path, f"is damaged: has {size:,} bytes where {record.bytes:,} were written")
    if full and sha256_file(path) != record.sha256:
        raise StorageError(path, "is damaged: its SHA-256 is not the one recorded when it was written")


def remove_leftovers(folder: Path) -> None:
    """Removes what a run that was killed left under temporary names. Hold the folder's lock when calling this."""
    with disk_errors(folder):
        for path in sorted(folder.glob(f"{TEMPORARY}*")):
            if path.is_file():
                path.unlink()


def is_unclaimed(folder: Path) -> bool:
    """Tells whether a folder is missing or holds nothing but a lock and left-overs of this package."""
    _refuse_file(folder)
    if not folder.exists():
        return True
    ours = (LOCK, ".DS_Store")
    with disk_errors(folder):
        return all(path.name in ours or path.name.startswith(TEMPORARY) for path in folder.iterdir())


def claim_output(folder: Path, identity: Mapping[str, Any], what: str, record: str = IDENTITY) -> bool:
    """Makes `folder` the output of one configuration, or finds that it already is; returns True in the latter case.

    `what` names the kind of output in a few words ("flat index"), `identity` holds the JSON values that decide its
    content, and `record` is the file that keeps both. A folder of another configuration is a `StorageError` with every
    differing value; so is a folder with content that this package did not make.
    """
    claim = json.loads(json.dumps({"identity": dict(identity), "what": what}))
    if is_unclaimed(folder):
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / record, claim)
        return False
    if not (folder / record).exists():
        raise foreign_folder(folder)
    found = read_json(folder / record)
    if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
        raise StorageError(folder / record, "is damaged: holds no identity; delete the folder and run again")
    if found.get("what") != what:
        raise StorageError(folder, f"holds another kind of output ({found.get('what')}); choose another --output")
    refuse_differences(folder, found["identity"], claim["identity"])
    return True


def _refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StorageError(folder, "is a file, not a folder; choose another --output")


def foreign_folder(folder: Path) -> StorageError:
    """Returns the error for an output folder with somebody else's files in it."""
    return StorageError(folder, "is not empty and was not made by llara for this; choose another --output")


def refuse_differences(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a `StorageError` that lists every value in which two identities differ; both hold JSON values."""
    old, new = _flatten(found), _flatten(wanted)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key, _Absent) != new.get(key, _Absent))
    if keys:
        listed = ", ".join(f"{key} was {_show(old, key)}, is now {_show(new, key)}" for key in keys)
        advice = "choose another --output, or delete this folder to start again"
        raise StorageError(folder, f"belongs to another configuration ({listed}); {advice}")


def save_config(folder: Path, config: JobConfig) -> None:
    """Writes the effective configuration as `config.toml`, which `--config` reads back."""
    write_atomic(folder / "config.toml", to_toml(config).encode())


class FolderLock:
    """Lets one process at a time write into a folder, which is created where missing; use it with `with`.

    The lock belongs to the process and ends with it, however it ends. A second writer gets a `StorageError` that says
    who holds the lock. The lock file is removed at the end, so that it is no part of an output.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._descriptor = -1

    def __enter__(self) -> Self:
        _refuse_file(self.path.parent)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._descriptor < 0:
                self._descriptor = self._try()
        with contextlib.suppress(OSError):  # the name is a courtesy: on a full disk the lock holds without it
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        # Removed while still held: whoever waits on the old file finds in `_try` that it is no longer the folder's.
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def _try(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._holder(descriptor)
            os.close(descriptor)
            advice = "wait until it ends, or choose another --output"
            raise StorageError(self.path.parent, f"is being written by {holder}; {advice}") from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            _notes["no file locks here: two runs writing into one folder are not kept apart"] = None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return descriptor
        os.close(descriptor)
        return -1

    @staticmethod
    def _holder(descriptor: int) -> str:
        # The holder writes its name right after it got the lock: give it a moment.
        for _ in range(20):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            if holder:
                return holder
            time.sleep(0.01)
        return "another process"


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _notes["no folder fsync here: after a power cut the last published file may be missing"] = None
    finally:
        os.close(descriptor)


def _refuse_special(path: Path) -> None:
    with disk_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(path.stat().st_mode):
            what = "a folder" if path.is_dir() else "a device, a pipe or a socket"
            raise StorageError(path, f"is {what}, not a file that can be written anew; choose another --output")


def reserve(descriptor: int, size: int) -> None:
    """Takes the space of a file that will be written, where the file system can; OSError where there is too little."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _notes["posix_fallocate is not supported here: a full disk is noticed while writing, not before"] = None


def _check_written(path: Path, written: int, promised: int | None, on_disk: int) -> None:
    # A caller that promises a wrong size is our fault, a short file the system's.
    assert promised is None or promised == written, f"{path}: {promised} bytes promised, {written} written"
    if on_disk != written:
        raise StorageError(path, f"only {on_disk:,} of {written:,} bytes reached the disk")


_Absent = object()  # stands for a key that one of two identities does not have


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "not set"
