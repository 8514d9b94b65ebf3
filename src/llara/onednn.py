"""Linear maps in float32 through oneDNN, on CPUs where torch's own product leaves half of the machine unused.

Torch multiplies float32 matrices with MKL, which takes no more than AVX2 on a CPU that is not Intel's. oneDNN, which
torch has for other types, takes what there is: about twice as many operations per second on an AMD CPU with AVX512
(`benchmarks/linear.py`). Sums are of float32 either way, in another order.

oneDNN makes a program for every number of rows that it meets, and keeps it: under 800 numbers of rows, one map of
256 x 768 grew by 3.4 GB. Batches are cut by tokens, so nearly each has a number of its own. Hence blocks of a few
sizes; the rest of the rows goes through torch's product.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCKS = (1024, 512, 256, 64)  # rows that oneDNN multiplies at once
NEAR = 1e-4  # between a product of small numbers and torch's own


class OneDnnLinear(nn.Linear):
    """A linear map whose products in float32 on a CPU go through oneDNN, forward and backward; others are as ever.

    Gradients of gradients are refused, and `torch.func` and `torch.jit` do not know it.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Returns [..., out] for [..., in]."""
        if torch.is_autocast_enabled("cpu") or not _are_float32_on_cpu(states, self.weight):
            return super().forward(states)
        found: Tensor = _Product.apply(states, self.weight)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias


class _Product(Function):
    """`states` [..., in] times the transposed `weight` [out, in]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return product(states.reshape(-1, states.shape[-1]), weight).view(*states.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        of_states, of_weight = ctx.needs_input_grad
        rows = gradient.reshape(-1, len(weight)).contiguous()  # it may be one number, seen as a whole array
        back = product(rows, weight.t()).view_as(states) if of_states else None
        return back, _sum_of_products(rows, states.reshape(-1, states.shape[-1])) if of_weight else None


def multiplies(rows: Tensor, weight: Tensor) -> bool:
    """Tells whether `product` takes these, and is faster than torch's own."""
    return _are_float32_on_cpu(rows, weight) and is_faster_here()


def _are_float32_on_cpu(*tensors: Tensor) -> bool:
    return all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """Returns [n, out] for [n, in] and [out, in], both float32 on a CPU, without what autograd needs."""
    if len(rows) in BLOCKS:  # nothing to put together
        return _multiply(rows, weight)
    found = rows.new_empty(len(rows), len(weight))
    for start, stop, whole in _blocks(len(rows)):
        if whole:
            found[start:stop] = _multiply(rows[start:stop], weight)
        else:
            torch.mm(rows[start:stop], weight.t(), out=found[start:stop])
    return found


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Returns the transposed `left` [n, out] times `right` [n, in], which is [out, in]."""
    total = left.new_zeros(left.shape[1], right.shape[1])
    for start, stop, whole in _blocks(len(left)):
        if whole:
            total += _multiply(left[start:stop].t(), right[start:stop].t())
        else:
            total.addmm_(left[start:stop].t(), right[start:stop])
    return total


def _blocks(rows: int) -> Iterator[tuple[int, int, bool]]:
    """Cuts rows into blocks of the sizes of `BLOCKS`, and a rest; yields where each starts and stops."""
    start = 0
    for size in BLOCKS:
        while rows - start >= size:
            yield start, start + size, True
            start += size
    if start < rows:
        yield start, rows, False


def _multiply(states: Tensor, weight: Tensor) -> Tensor:
    """What `torch.nn.functional.linear` returns. Torch's own name for it: the public one takes MKL.

    It can add a bias, too, but takes one that is no whole array for another (torch 2.13).
    """
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return found


def use_onednn(module: Any) -> None:
    """Has the linear maps below a module take their products from oneDNN, where that is faster here."""
    if is_faster_here():
        _change(module, nn.Linear, OneDnnLinear)


def leave_onednn(module: Any) -> None:
    """Undoes `use_onednn`: what compiles a model knows torch's own maps."""
    _change(module, OneDnnLinear, nn.Linear)


def _change(module: Any, old: type[nn.Linear], new: type[nn.Linear]) -> None:
    for part in module.modules():
        if type(part) is old:
            part.__class__ = new  # the same object, so that names, hooks and ties stay


@functools.cache
def is_faster_here() -> bool:
    """Tells whether this CPU is one where MKL holds back and oneDNN does not, and whether torch has what it takes.

    By the kind of the machine and not by timing: a run that is taken up again must compute as it did.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and is_amd() and works()


def is_amd(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tells whether the CPU is AMD's; False where the system does not say."""
    return cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")


def works() -> bool:
    """Tries the product, whose name torch may change at any time, in the forms that are used."""
    states, weight = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(-1, 1, 20).view(5, 4)
    try:
        found = [_multiply(states, weight), _multiply(states.t(), states.t())]
    except (AttributeError, RuntimeError, TypeError):
        return False
    wanted = [nn.functional.linear(states, weight), states.t() @ states]
    return all(torch.allclose(one, other, atol=NEAR) for one, other in zip(found, wanted, strict=True))
