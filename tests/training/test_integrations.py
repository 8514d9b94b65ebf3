"""Optional packages, in processes of their own that see them: bitsandbytes trains, loggers get what the log says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTEGRATIONS = Path(sys.prefix) / "integrations"


@pytest.mark.parametrize("name", ["four_bits", "recipe", "wandb", "trackio"])
def test_with_what_is_optional(name: str, root: Path, tmp_path: Path) -> None:
    if not (INTEGRATIONS / ".installed").is_file():
        pytest.skip("make test installs these packages beside the environment")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    environment |= {"PYTHONPATH": f"{INTEGRATIONS}:{root}", "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "tests.training.with_integrations", name, str(tmp_path)]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
