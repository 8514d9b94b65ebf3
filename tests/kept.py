"""Whether what a method returns is let go before it is called again."""

import weakref
from typing import Any

import pytest
import torch


def refuse_kept(monkeypatch: pytest.MonkeyPatch, model: Any, method: str) -> list[weakref.ref[torch.Tensor]]:
    """Fails a call of the method while a tensor of an earlier call lives; returns a list that names all of them."""
    returned, original = list[weakref.ref[torch.Tensor]](), getattr(model, method)

    def watched(*arguments: Any) -> torch.Tensor:
        assert [each() for each in returned] == [None] * len(returned)
        found: torch.Tensor = original(*arguments)
        returned.append(weakref.ref(found))
        return found

    monkeypatch.setattr(model, method, watched)
    return returned
