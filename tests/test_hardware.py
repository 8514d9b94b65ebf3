"""GPUs by name, and memory that is kept."""

import subprocess
import sys

import pytest

from llara.errors import ConfigError
from llara.hardware import GPUS, cores, memory_bytes, parse_fleet


@pytest.mark.parametrize(
    ("text", "number", "name", "memory"),
    [
        ("8xH100-80GB", 8, "H100", 80),
        ("8 x h100", 8, "H100", 80),
        ("L4", 1, "L4", 24),
        ("2*A100-40", 2, "A100", 40),
        ("4xrtx 4090", 4, "RTX4090", 24),
        ("16xV100-16gb", 16, "V100", 16),
    ],
)
def test_a_fleet_is_a_number_of_gpus_of_one_kind(text: str, number: int, name: str, memory: int) -> None:
    fleet = parse_fleet(text)
    assert (fleet.number, fleet.name, fleet.memory_gb) == (number, name, memory)
    assert fleet.memory == memory * 10**9
    assert parse_fleet(str(fleet)) == fleet


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("8xH1000", "--fleet: unknown GPU 'H1000' (did you mean 'H100'?); known are T4, "),
        ("A100-64GB", "--fleet: A100 comes with 40 GB or 80 GB, not with 64 GB"),
        ("0xL4", "--fleet: '0xL4' is not of the form NUMBERxNAME or NUMBERxNAME-MEMORY, as 8xH100-80GB"),
        ("eight", "--fleet: unknown GPU 'eight'"),
        ("", "--fleet: '' is not of the form"),
        ("8xH100-80TB", "--fleet: '8xH100-80TB' is not of the form"),
    ],
)
def test_a_fleet_that_there_is_not_is_named(text: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(text)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(fault)


def test_training_needs_bfloat16_where_the_table_says_it_is() -> None:
    assert {name for name, gpu in GPUS.items() if not gpu.bf16} == {"T4", "V100"}
    assert all(gpu.single < gpu.half for gpu in GPUS.values())


def test_this_machine_has_cores_and_memory() -> None:
    assert cores() >= 1
    assert (memory_bytes() or 0) > 2**20


def test_freed_memory_is_kept_where_the_c_library_can_and_goes_back_at_the_end() -> None:
    code = (
        "import resource\n"
        "from llara.hardware import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5): b'x' * 128_000_000\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults()\n"
        "with keep_freed_memory() as able:\n"
        "    faults()\n"
        "    print(int(able), first, faults())\n"
        "print(faults())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    able, usual, kept, after = map(int, done.stdout.split())
    if not able:
        pytest.skip("this C library has no mallopt")
    assert usual > 10_000  # 128 MB in pages of 4 KiB, five times
    assert kept < usual / 100
    assert after > 10_000
