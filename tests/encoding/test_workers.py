"""Worker processes: their place on the machine, their end with their driver, and the parts that pools are made of."""

import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara import errors, hardware
from llara.config import EncodeConfig
from llara.encoding import engines
from llara.encoding.desk import TRIES, Desk
from llara.encoding.encode import encode
from llara.encoding.encoder import DocumentEncoder, one_ahead
from llara.encoding.engine import Advance, Found, Job
from llara.encoding.engines import Local, choose_engine
from llara.encoding.pool import Facts, same_facts
from llara.encoding.processes import Processes, places
from llara.encoding.worker import Place
from llara.errors import ConfigError, DataError, MissingExtra, ModelError, StorageError, WorkerError
from llara.progress import Progress
from llara.records import Document
from llara.retriever import Retriever
from tests import tiny
from tests.encoding.helpers import FakeEncoder, corpus_lines, run, tree, write_corpus

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 60.0  # seconds: a machine with much else to do


def config(**changes: Any) -> EncodeConfig:
    values: dict[str, Any] = {"model": "mini", "corpus": (Path("c"),), "output": Path("o")}
    return EncodeConfig(**values | changes)


@contextlib.contextmanager
def driver(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """A driver in a process group of its own, in the middle of its work, and the ids of its workers."""
    rows = [b'{"_id": "d%d", "text": "SLOW"}' % number for number in range(500)]
    corpus = write_corpus(folder / "corpus.jsonl", rows)
    command = [sys.executable, "-m", "tests.encoding.drive", str(corpus), str(folder / "vectors")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        workers = [int(each) for each in process.stdout.readline().split()]
        assert len(workers) == 2 and all(map(lives, workers))
        yield process, workers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_driver_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    with driver(tmp_path) as (process, workers):
        process.kill()
        wait_until(lambda: not any(map(lives, workers)))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_control_c_stops_driver_and_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    with driver(tmp_path) as (process, workers):
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=WITHIN)[1]
        assert process.returncode == 130
        assert "stopped; to resume: " in said and "Traceback" not in said
        assert not any(map(lives, workers))


def test_processes_and_one_process_leave_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.save_base(Path("model"))
    write_corpus(Path("corpus.jsonl"), corpus_lines(30))
    given: dict[str, Any] = {"model": str(model), "corpus": (Path("corpus.jsonl"),), "output": Path("vectors")}
    given |= {
        "shard_size": 7,
        "device": "cpu",
        "sparse": True,
        "worker_threads": 1,
        "long": "cut",
        "passage_length": 40,
    }
    encode(config(**given))
    alone = tree(Path("vectors"))
    Path("vectors").rename("alone")
    capsys.readouterr()
    encode(config(**given, workers=2))
    assert tree(Path("vectors")) == alone
    said = capsys.readouterr().err
    assert "encode: 30 documents" in said


class Reversed:
    """Takes all shards, and gives them back from the last to the first; stops before one of them."""

    def __init__(self, stop: str = "") -> None:
        self.plain, self.stop = FakeEncoder(), stop

    def encode(self, jobs: Iterator[Job], advance: Advance) -> Iterator[tuple[str, Found]]:
        for job in reversed(list(jobs)):
            if job.name == self.stop:
                raise KeyboardInterrupt
            yield job.name, self.plain(job.documents)
            advance(len(job.documents))


def test_the_order_in_which_shards_come_back_changes_nothing(tmp_path: Path) -> None:
    lines = corpus_lines(47)
    lines[3], lines[44] = b"bad", lines[1]
    corpus = write_corpus(tmp_path / "corpus.jsonl", lines)
    run(corpus, tmp_path / "plain")
    run(corpus, tmp_path / "reversed", encode=Reversed())
    assert tree(tmp_path / "reversed") == tree(tmp_path / "plain")


def test_a_run_that_finished_later_shards_first_goes_on_in_the_gap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = corpus_lines(47)
    lines[44] = lines[1]
    corpus = write_corpus(tmp_path / "corpus.jsonl", lines)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "out", encode=Reversed(stop="shard-00001"))
    finished = sorted(path.stem for path in (tmp_path / "out").glob("shard-*.json"))
    assert finished == ["shard-00002", "shard-00003", "shard-00004"]
    lines += corpus_lines(60)[47:]  # and grown meanwhile
    write_corpus(corpus, lines)
    engine = Reversed()
    with Progress("encode", len(lines), "passages") as progress:
        assert run(corpus, tmp_path / "out", encode=engine, progress=progress).reused_shards == 3
        assert progress.done == len(lines)
    assert [len(call) for call in engine.plain.calls] == [3, 10, 10, 10]
    assert "60 passages, 33 of them now" in capsys.readouterr().err


def test_shards_are_handed_out_breadth_first_and_lost_ones_alone() -> None:
    jobs = iter([Job(name, [Document(name, "")]) for name in "abcdefgh"])
    desk = Desk(jobs)

    def hand_out(*workers: int) -> list[tuple[int, str]]:
        return [(worker, job.name) for worker, job in desk.hand_out(list(workers))]

    assert hand_out(1, 2) == [(1, "a"), (2, "b"), (1, "c"), (2, "d")]
    assert hand_out(1, 2) == []
    assert [job.name for job in desk.lost(1, "died")] == ["a", "c"]
    assert hand_out(2, 3) == [(3, "a")], "alone; and the other worker runs dry, to take the next"
    desk.done(2, "b")
    assert hand_out(2, 3) == []
    desk.done(2, "d")
    assert hand_out(2, 3) == [(2, "c")]
    desk.done(2, "c")
    desk.done(3, "a")
    assert hand_out(2, 3) == [(2, "e"), (3, "f"), (2, "g"), (3, "h")]
    for worker, name in ((2, "e"), (2, "g"), (3, "f")):
        desk.done(worker, name)
        hand_out(2, 3)
    assert not desk.finished
    desk.done(3, "h")
    assert desk.finished


def test_a_shard_that_is_lost_too_often_names_its_documents() -> None:
    desk = Desk(iter([Job("shard-00007", [Document(f"d{number}", "") for number in range(1200)])]))
    for worker in range(TRIES):
        list(desk.hand_out([worker]))
        if worker < TRIES - 1:
            desk.lost(worker, "died")
    told = r"the last of which died; its 1,200 documents are d0, d1 and so on to d1199\."
    with pytest.raises(WorkerError, match=rf"^shard-00007 was lost with 3 workers, {told}"):
        desk.lost(TRIES - 1, "died")


def test_workers_get_cores_and_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from llara.encoding import processes

    monkeypatch.setattr(processes, "usable_cores", lambda: [0, 2, 4, 6, 8])
    assert places(2, [], None) == [Place(2, (0, 2)), Place(2, (4, 6), talks=False)]
    assert places(2, ["GPU-a", "GPU-b"], 1) == [Place(1, (0,), "GPU-a"), Place(1, (2,), "GPU-b", talks=False)]
    assert [place.gpu for place in places(3, ["0", "1"], None)] == ["0", "1", "0"]
    many = places(7, [], None)
    assert {(place.threads, place.cores) for place in many} == {(1, ())}, "more workers than cores share them all"


def test_one_process_per_gpu_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "visible_gpus", lambda: ["0", "1", "2"])
    pool = choose_engine(config())
    assert isinstance(pool, Processes) and [place.gpu for place in pool._places] == ["0", "1", "2"]
    assert isinstance(choose_engine(config(workers=1)), Local)
    assert isinstance(choose_engine(config(device="cuda:1")), Local)
    assert isinstance(choose_engine(config(device="cpu")), Local)
    assert isinstance(choose_engine(config(dtype="int8")), Local), "which the CPU alone runs"
    on_cpu = choose_engine(config(device="cpu", workers=2))
    assert isinstance(on_cpu, Processes) and [place.gpu for place in on_cpu._places] == [None, None]
    monkeypatch.setattr(engines, "visible_gpus", list)
    assert isinstance(choose_engine(config()), Local)


def test_visible_gpus_are_named_as_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engines.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7,3")
    assert engines.visible_gpus() == ["GPU-7", "3"]


def test_workers_whose_models_differ_are_refused() -> None:
    known = Facts({"dtype": "float32", "dim": 4}, 4)
    assert same_facts(None, known) == same_facts(known, copy.deepcopy(known)) == known
    with pytest.raises(ModelError, match=r"they differ in dtype \(float32 and bfloat16\)"):
        same_facts(known, Facts({"dtype": "bfloat16", "dim": 4}, 4))


MISTAKES = (
    ConfigError(["--a: is wrong", "--b: too"]),
    DataError("corpus.jsonl", 7, "is a bad one"),
    DataError("corpus.jsonl", None, "x" * 5000),
    ModelError("no such model"),
    StorageError(Path("folder"), "is full"),
    MissingExtra("--engine ray", "ray"),
    WorkerError("gone"),
)


@pytest.mark.parametrize("error", MISTAKES, ids=lambda error: type(error).__name__)
def test_errors_come_from_a_worker_as_they_were(error: errors.LlaraError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_the_next_is_made_while_the_last_is_used_and_errors_come_in_their_place() -> None:
    made: list[int] = []
    second = threading.Event()

    def make() -> int | None:
        made.append(len(made))
        if len(made) == 2:
            second.set()
        if len(made) == 4:
            raise ModelError("the fourth")
        return made[-1]

    ahead = one_ahead(make)
    assert next(ahead) == 0
    assert second.wait(WITHIN), "made before it is asked for"
    assert next(ahead) == 1
    assert next(ahead) == 2
    with pytest.raises(ModelError, match="the fourth"):
        next(ahead)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), MemoryError()])
def test_memory_that_runs_out_is_an_error_of_the_users(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    made = DocumentEncoder(Retriever(tiny.model()), config(token_budget=4096))

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(made.retriever.model, "states", fail)
    with pytest.raises(ModelError, match=r"out of memory.* Lower --token-budget \(now 4,096\)") as caught:
        made([Document("d", "text")])
    assert "\n" not in str(caught.value)
    assert hardware.is_out_of_memory(error)


def test_another_fault_in_a_pass_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made = DocumentEncoder(Retriever(tiny.model()), config())

    def fail(*_: Any) -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr(made.retriever.model, "states", fail)
    with pytest.raises(RuntimeError, match=r"^a fault$"):
        made([Document("d", "text")])


def test_threads_are_as_before_when_the_job_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr(Retriever, "for_job", classmethod(lambda cls, config: cls(tiny.model())))
    with Local(config(worker_threads=before + 1, device="cpu")) as engine:
        engine.facts()
        assert torch.get_num_threads() == before + 1
        found = dict(engine.encode(iter([Job("a", [Document("d", "text")])]), lambda n: None))
    assert torch.get_num_threads() == before
    assert np.asarray(found["a"]).shape == (1, tiny.HIDDEN)


PROBLEMS = (
    ({"workers": 0, "worker_threads": 0}, ["--workers: must be 1 or more", "--worker-threads: must be 1 or more"]),
    (
        {"address": "a:1", "worker_gpus": 1.0},
        ["--address: goes with --engine ray", "--worker-gpus: goes with"],
    ),
    ({"engine": "ray"}, ["--address: is required with --engine ray"]),
    ({"workers": 2, "device": "cuda:1"}, ["--device: cuda:1 is one device"]),
    ({"engine": "ray", "address": "a:1", "device": "mps"}, ["--device: mps is one device"]),
    ({"engine": "ray", "address": "a:1", "device": "cpu", "worker_gpus": 1.0}, ["--worker-gpus: goes with --device"]),
    ({"engine": "ray", "address": "a:1", "worker_gpus": 1.5}, ["--worker-gpus: above 1 it must be a whole number"]),
    ({"engine": "ray", "address": "a:1", "worker_gpus": -1.0}, ["--worker-gpus: must be 0 or more"]),
)


@pytest.mark.parametrize(("changes", "told"), PROBLEMS)
def test_settings_that_do_not_go_together(changes: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert len(caught.value.problems) == len(told)
    assert all(problem.startswith(start) for problem, start in zip(caught.value.problems, told, strict=True))
