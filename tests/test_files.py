"""Publishing, checking, claiming and locking."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llara import files
from llara.config import EncodeConfig
from llara.errors import ConfigError, DataError, StorageError
from llara.files import (
    FileRecord,
    FolderLock,
    check_file,
    check_output,
    claim_output,
    confined,
    durability_notes,
    publish_file,
    publish_folder,
    read_json,
    remove_leftovers,
    save_config,
    sha256_file,
    temporary_path,
    write_atomic,
    write_json_atomic,
)


@pytest.fixture(autouse=True)
def forget_notes() -> Iterator[None]:
    files._notes.clear()
    yield
    files._notes.clear()


def failing(code: int) -> Any:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_has_the_record_returned(tmp_path: Path) -> None:
    record = write_atomic(tmp_path / "deep" / "file", b"content")
    assert record == FileRecord(7, hashlib.sha256(b"content").hexdigest())
    assert (tmp_path / "deep" / "file").read_bytes() == b"content"
    assert sha256_file(tmp_path / "deep" / "file") == record.sha256
    assert names(tmp_path / "deep") == ["file"]


def test_chunks_and_empty_files(tmp_path: Path) -> None:
    assert write_atomic(tmp_path / "chunks", (b"a", memoryview(b"bc")), size=3).bytes == 3
    assert write_atomic(tmp_path / "chunks", iter((b"d", b"e"))).bytes == 2
    assert (tmp_path / "chunks").read_bytes() == b"de"
    assert write_atomic(tmp_path / "empty", b"").bytes == 0


def test_a_mapped_file_survives_its_replacement(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "file"
    write_atomic(path, b"x" * 10_000)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        write_atomic(path, b"y")
        assert mapped[9_999] == ord("x"), "the old file was cut in place"


def test_a_source_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise DataError("corpus", 1, "broken")

    write_atomic(tmp_path / "file", b"old")
    with pytest.raises(DataError, match="corpus:1: broken"):
        write_atomic(tmp_path / "file", chunks())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["posix_fallocate", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_path_and_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    monkeypatch.setattr(os, step, failing(code))
    with pytest.raises(StorageError, match=r"file: needs 5 bytes, [\d,]+ are free: make room"):
        write_atomic(tmp_path / "file", b"12345")
    assert names(tmp_path) == []


def test_a_file_size_limit_is_said(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from llara.files import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomic(Path(sys.argv[1]), b'x' * 2000)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "file")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "StorageError" in result.stderr
    assert "needs 2,000 bytes" in result.stderr
    assert "ulimit -f" in result.stderr
    assert names(tmp_path) == []


def test_a_write_that_stays_short_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat

    def short(descriptor: int) -> Any:
        found = real(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return found
        return os.stat_result((*found[:6], 3, *found[7:10]))

    monkeypatch.setattr(os, "fstat", short)
    with pytest.raises(StorageError, match="only 3 of 5 bytes reached the disk"):
        write_atomic(tmp_path / "file", iter([b"12345"]))
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_other_faults_of_the_system_are_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file.below: (Not a directory|File exists)"):
        write_atomic(tmp_path / "file" / "below", b"")


def test_what_a_file_system_lacks_is_noted_and_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert durability_notes() == []
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    real = os.fsync
    folder_fsync = failing(errno.EINVAL)
    monkeypatch.setattr(os, "fsync", lambda fd: (folder_fsync if stat.S_ISDIR(os.fstat(fd).st_mode) else real)(fd))
    write_atomic(tmp_path / "file", b"content")
    monkeypatch.setattr(files.fcntl, "flock", failing(errno.ENOLCK))
    with FolderLock(tmp_path):
        pass
    text = "\n".join(durability_notes())
    assert "posix_fallocate is not supported" in text
    assert "no folder fsync" in text
    assert "no file locks" in text


def test_a_system_without_posix_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    assert write_atomic(tmp_path / "file", b"content").bytes == 7
    assert any("no posix_fallocate" in note for note in durability_notes())


def test_json_has_one_spelling(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"b": 1, "ä": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n "b": 1,\n "ä": [\n  1.5,\n  null\n ]\n}\n'
    assert read_json(tmp_path / "a.json") == {"b": 1, "ä": [1.5, None]}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_broken_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"a\.json: is damaged: not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(StorageError, match=r"b\.json: is missing"):
        read_json(tmp_path / "b.json")
    with pytest.raises(StorageError, match="Is a directory"):
        read_json(tmp_path)


def test_check_file_compares_size_and_on_request_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    record = write_atomic(path, b"content")
    check_file(path, record, full=True)
    path.write_bytes(b"contenT")
    check_file(path, record, full=False)
    with pytest.raises(StorageError, match="file: is damaged: its SHA-256"):
        check_file(path, record, full=True)
    path.write_bytes(b"content, and more")
    with pytest.raises(StorageError, match="has 17 bytes where 7 were written"):
        check_file(path, record, full=False)
    path.unlink()
    with pytest.raises(StorageError, match="file: is missing"):
        check_file(path, record, full=False)


def test_a_claim_is_made_once_and_then_recognised(tmp_path: Path) -> None:
    output = tmp_path / "out"
    identity = {"seed": 1, "dims": (1, 2), "model": {"name": "mini"}}
    assert not claim_output(output, identity, "flat index")
    assert claim_output(output, identity, "flat index")
    with pytest.raises(StorageError) as caught:
        claim_output(output, {"seed": 2, "dims": (1, 2), "model": {"name": "tiny"}, "new": None}, "flat index")
    message = str(caught.value)
    assert 'model.name was "mini", is now "tiny", new was not set, is now null, seed was 1, is now 2' in message
    assert "dims" not in message
    assert "choose another --output, or delete" in message
    with pytest.raises(StorageError, match=r"holds another kind of output \(flat index\)"):
        claim_output(output, identity, "adapted model")


def test_a_claim_refuses_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(StorageError, match="is not empty and was not made by llara"):
        claim_output(tmp_path, {}, "flat index")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        claim_output(tmp_path / "holiday.jpg", {}, "flat index")
    assert names(tmp_path) == ["holiday.jpg"]


def test_a_claim_takes_a_folder_with_leftovers_only(tmp_path: Path) -> None:
    temporary_path(tmp_path / "x").write_bytes(b"")
    (tmp_path / ".lock").write_bytes(b"")
    assert not claim_output(tmp_path, {}, "flat index", record="mine.json")
    assert (tmp_path / "mine.json").exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", "mine.json"]


@pytest.mark.parametrize("content", [b"[]", b'{"identity": 1}'])
def test_a_damaged_claim_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "identity.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"identity\.json: is damaged"):
        claim_output(tmp_path, {}, "flat index")


def test_publishing_a_file_that_another_library_wrote(tmp_path: Path) -> None:
    staged = temporary_path(tmp_path / "file")
    staged.write_bytes(b"content")
    assert publish_file(staged, tmp_path / "file").bytes == 7
    assert names(tmp_path) == ["file"]
    with pytest.raises(StorageError, match="No such file"):
        publish_file(staged, tmp_path / "file")


def test_publishing_a_folder(tmp_path: Path) -> None:
    staged, final = tmp_path / ".tmp-staged", tmp_path / "final"
    (staged / "inner").mkdir(parents=True)
    (staged / "inner" / "file").write_bytes(b"1")
    publish_folder(staged, final)
    assert (final / "inner" / "file").read_bytes() == b"1"
    staged.mkdir()
    with pytest.raises(StorageError, match="exists already and is not empty"):
        publish_folder(staged, final)
    assert staged.is_dir()


def test_the_configuration_is_saved_as_toml(tmp_path: Path) -> None:
    import tomllib

    config = EncodeConfig(model="mini", corpus=(Path("a"), Path("b")), output=tmp_path)
    save_config(tmp_path, config)
    assert tomllib.loads((tmp_path / "config.toml").read_text())["corpus"] == ["a", "b"]


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "out"):
        script = (
            "import sys; from pathlib import Path; from llara.files import FolderLock\n"
            "with FolderLock(Path(sys.argv[1])): pass"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "out")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"is being written by process {os.getpid()} on " in result.stderr
        with pytest.raises(StorageError, match="wait until it ends, or choose another --output"):
            FolderLock(tmp_path / "out").__enter__()
    assert names(tmp_path / "out") == []
    with FolderLock(tmp_path / "out"):
        assert names(tmp_path / "out") == [".lock"]


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 999999 on another machine, with a long name")
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert "999999" not in (tmp_path / ".lock").read_text()
    assert names(tmp_path) == []


def test_a_record_names_files_of_its_folder_only(tmp_path: Path) -> None:
    for name in ("manifest.json", "shard-00000.docs.npy", ".hidden", "a..b", "Größe"):
        assert confined(tmp_path, name) == tmp_path / name
    for name in ("", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "nul\0", None, 3, ["x"]):
        with pytest.raises(StorageError, match="which is no file name") as caught:
            confined(tmp_path, name)
        assert caught.value.path == str(tmp_path)


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    before = names(tmp_path)
    for name, said in (("folder", "is a folder"), ("pipe", "is a device, a pipe"), ("null", "is a device, a pipe")):
        with pytest.raises(StorageError, match=f"{name}: {said}.*choose another --output"):
            write_atomic(tmp_path / name, b"content")
        with pytest.raises(StorageError, match=f"{name}: {said}"):
            check_output(tmp_path / name, [])
    assert names(tmp_path) == before
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_an_output_that_is_also_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "queries").write_text("q")
    (tmp_path / "link").symlink_to("queries")
    for output in (tmp_path / "queries", tmp_path / "link", tmp_path / "x" / ".." / "queries"):
        with pytest.raises(ConfigError, match=r"--output: .* is also an input"):
            check_output(output, [tmp_path / "other", tmp_path / "queries"])
    check_output(tmp_path / "run", [tmp_path / "queries"])
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "qrels/test.tsv", "last.run"):
        (tmp_path / "beir" / name).write_text("x")
    for name in ("corpus.jsonl", "qrels/test.tsv"):
        with pytest.raises(ConfigError, match=f"--output: .*{name} is also an input"):
            check_output(tmp_path / "beir" / name, [tmp_path / "beir"])
    check_output(tmp_path / "beir" / "last.run", [tmp_path / "beir"])
    check_output(tmp_path / "queries" / "below", [])  # left to the write, which says what is wrong
