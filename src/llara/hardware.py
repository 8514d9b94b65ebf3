"""What torch finds on this machine, asked in a child process: a bfloat16 product may kill the process that tries it.

Seen with torch 2.13 on a CPU that advertises AMX: an illegal instruction inside the matrix library. So float32 is the
default on a CPU, and bfloat16 is tried in a child before a model runs in it.
"""

import json
import signal
import subprocess
import sys

PROBE_SECONDS = 120

# The first line is written before the product that may be the last thing the process does.
PROBE = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
mps = torch.backends.mps.is_available()
print(json.dumps({"gpus": names + (["Apple MPS"] if mps else []), "threads": torch.get_num_threads()}), flush=True)
a, b = torch.ones(300, 256, dtype=torch.bfloat16), torch.ones(768, 256, dtype=torch.bfloat16)
assert torch.nn.functional.linear(a, b)[0, 0].item() == 256
print("ok", flush=True)
"""
WORKS = "works"


def probe_torch() -> tuple[tuple[str, ...], int | None, str]:
    """Asks a child process for GPUs, threads, and whether a bfloat16 product works; (gpus, threads, verdict)."""
    try:
        child = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return (), None, f"no answer within {PROBE_SECONDS} s"
    first, _, rest = child.stdout.partition("\n")
    if not first:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        return (), None, f"torch does not start: {last[0]}"
    found = json.loads(first)
    return tuple(found["gpus"]), found["threads"], _verdict(rest.strip() == "ok", child)


def _verdict(done: bool, child: "subprocess.CompletedProcess[str]") -> str:
    if done:
        return WORKS
    if child.returncode < 0:
        return f"kills the process ({signal.Signals(-child.returncode).name}); use --dtype float32"
    last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
    return f"fails: {last[0]}; use --dtype float32"
