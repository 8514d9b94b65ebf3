"""What `llara doctor` reports, also when the probe of the CPU goes wrong."""

import importlib.metadata
import json
import signal
import sys

import pytest

from llara import doctor, hardware
from llara.config import JobConfig
from llara.onednn import is_faster_here


def test_the_report_names_versions_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = doctor.doctor(JobConfig())
    text = report.to_text()
    assert report.packages["torch"] == importlib.metadata.version("torch")
    assert report.cores >= 1 and (report.memory_bytes or 0) > 2**20
    assert report.torch_threads == 1
    assert report.bfloat16_on_cpu
    assert report.products_on_cpu == ("oneDNN" if is_faster_here() else "torch")
    for line in (f"python: {sys.version.split()[0]}", "llara: ", "extra [dev]: ", "durability: ", "OMP_NUM_THREADS=1"):
        assert line in text
    assert json.dumps(vars(report))


def probe(monkeypatch: pytest.MonkeyPatch, script: str) -> tuple[tuple[str, ...], int | None, str]:
    monkeypatch.setattr(hardware, "PROBE", script)
    return hardware.probe_torch()


FIRST = 'print(\'{"gpus": ["G"], "threads": 2}\', flush=True)\n'


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (FIRST + "print('ok')", (("G",), 2, "works")),
        (FIRST + "raise SystemExit('bad')", (("G",), 2, "fails: bad; use --dtype float32")),
        ("raise SystemExit('no torch')", ((), None, "torch does not start: no torch")),
        (
            FIRST + f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})",
            (("G",), 2, "kills the process (SIGILL); use --dtype float32"),
        ),
    ],
)
def test_the_probe_survives_what_it_looks_for(
    script: str, expected: tuple[tuple[str, ...], int | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert probe(monkeypatch, script) == expected


def test_a_probe_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "PROBE_SECONDS", 1)
    assert probe(monkeypatch, "import time; time.sleep(60)") == ((), None, "no answer within 1 s")


def test_products_that_kill_their_process_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PRODUCTS", f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})")
    assert doctor._products() == "unknown"


def test_extras_come_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2", 'pytest>=9; extra == "dev"', 'no-such-package; extra == "data"', "pytest ; extra == 'data'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    assert doctor.extras_state() == {"data": "pip install 'llara[data]'", "dev": "installed"}


def test_no_secret_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [name for name in doctor.VARIABLES if "TOKEN" in name or "KEY" in name]
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setattr(hardware, "PROBE", FIRST)
    assert "hf_very_secret" not in doctor.doctor(JobConfig()).to_text()
