"""Tests that need a GPU with CUDA; elsewhere they skip, and say so."""

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The first GPU; skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU with CUDA")
    return torch.device("cuda")
