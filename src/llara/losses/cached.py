"""GradCache: a loss over any number of vectors, at the activation memory of one chunk.

Source: Gao et al. 2021 (arXiv 2101.06983, section 3). In three steps:

1. Encode all chunks without graph, and record the state of the random number generators before each.
2. Compute the loss on the vectors, in row chunks, and its gradient on each vector (`rows.row_gradients`).
3. Encode each chunk again, with graph, under its recorded state: dropout drops the same units as before. The gradient
   of `(vectors * gradient on them).sum()` on the weights is then that of the loss.

Step 3 gives the gradient of the loss over the vectors of step 1, so both must be the same vectors: the same chunks, not
only the same rows, since dropout and rounding depend on what shares a forward pass.

With several processes, each computes the loss of its own queries over the passages of all, which are gathered without
graph; the gradients that all of them found for a passage are summed where it was encoded.

Shapes: n rows of a chunk, N of all chunks, D dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Chunk = TypeVar("Chunk")


class RandomStates:
    """The state of the random number generators before each chunk: the CPU's, and the device's where that is another.

    Dropout draws from the device's: without its state a chunk's second pass would be of other vectors than its first.
    All lie in one block: what is kept between large blocks that come and go keeps their memory from being used again.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        present = self._present()
        self._states = [state.new_empty(count, len(state)) for state in present]

    def record(self, number: int) -> None:
        """Keeps the present state as that of a chunk."""
        for states, state in zip(self._states, self._present(), strict=True):
            states[number] = state

    @contextmanager
    def rewound(self, number: int) -> Iterator[None]:
        """Runs a block under the state of a chunk, and puts the present one back after it."""
        present = self._present()
        self._restore([states[number] for states in self._states])
        try:
            yield
        finally:
            self._restore(present)

    def _present(self) -> list[Tensor]:
        if self._device.type == "cpu":
            return [torch.get_rng_state()]
        return [torch.get_rng_state(), torch.get_device_module(self._device).get_rng_state(self._device)]

    def _restore(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0].clone())
        for state in states[1:]:
            torch.get_device_module(self._device).set_rng_state(state.clone(), self._device)


class GradCache(Generic[Chunk]):
    """One batch, chunk by chunk: its vectors, and what it takes to encode each chunk again exactly as it was.

    Args:
        encode: Turns a chunk into its vectors, [n, D]; with graph where grad mode is on.
        chunks: The batch.
        rows: int64 [n] per chunk, where its vectors stand among all: each of 0 to N - 1 once.
        device: Where it is encoded.
        keep: How many of the first chunks keep their graph instead of being encoded twice. What it buys is time, what
            it costs is their activations; the gradients are the same to the bit.
        again: What encodes a chunk the second time, where `encode` goes through a wrapper that is not entered twice.
    """

    def __init__(
        self,
        encode: Callable[[Chunk], Tensor],
        chunks: Sequence[Chunk],
        rows: Sequence[Tensor],
        device: torch.device,
        keep: int = 0,
        again: Callable[[Chunk], Tensor] | None = None,
    ) -> None:
        self._encode, self._again = encode, again or encode
        self._chunks, self._rows, self._keep = chunks, rows, keep
        self._states = RandomStates(len(chunks), device)
        self._graphs: dict[int, Tensor] = {}

    def vectors(self) -> Tensor:
        """Encodes every chunk, and returns the vectors of all, [N, D], without graph."""
        vectors = torch.empty(0)
        for number, (chunk, rows) in enumerate(zip(self._chunks, self._rows, strict=True)):
            self._states.record(number)
            with torch.set_grad_enabled(number < self._keep):
                part = self._encode(chunk)
            if number < self._keep:
                self._graphs[number] = part
            if number == 0:
                vectors = part.new_empty(sum(map(len, self._rows)), part.shape[1])
            vectors[rows] = part.detach()
        return vectors

    def surrogate(self, number: int, gradient: Tensor) -> Tensor:
        """Returns a scalar whose gradient on the weights is the loss's, as far as it comes through one chunk.

        Call it once per chunk, and let each go backward before the next, so that one graph at a time is in memory.

        Args:
            number: The chunk.
            gradient: [N, D], the loss's gradient on all vectors.
        """
        vectors = self._graphs.pop(number, None)
        if vectors is None:
            with torch.enable_grad(), self._states.rewound(number):
                vectors = self._again(self._chunks[number])
        return (vectors * gradient[self._rows[number]].to(vectors.dtype)).sum()


def processes() -> int:
    """Returns how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Returns the rows of all processes, in the order of their ranks and without graph, and where our own start.

    Args:
        rows: [n, ...]; n may differ from process to process, the rest may not.
    """
    rows = rows.detach()
    if processes() == 1:
        return rows, 0
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(processes())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered, sum(counts[: dist.get_rank()])


def own_gradient(gradient: Tensor, start: int, count: int) -> Tensor:
    """Returns the sum over all processes of a gradient on gathered rows, for our own `count` rows from `start` on.

    `gradient` is overwritten.
    """
    if processes() > 1:
        dist.all_reduce(gradient)
    return gradient[start : start + count]
