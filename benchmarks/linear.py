"""Linear maps in float32 on this CPU: through oneDNN, as llara takes them where that is faster, beside torch's own.

    python benchmarks/linear.py [--rounds 7] [--threads N] [--force]

Products alone, forward and both backward, in operations per second; then `mini` itself, whose maps are changed back and
forth between turns: seconds of its forward pass over 24 x 128 tokens, and of forward and backward. Both sides take
turns in one process. Where llara leaves torch's product alone, because the machine gains nothing, nothing is measured
without --force, and no target is met. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llara import onednn
from llara.config import ModelConfig
from llara.loading import load_model
from llara.onednn import OneDnnLinear, leave_onednn, use_onednn

TARGET = {"forward and backward of mini": 1.3}  # times torch's own, where llara takes oneDNN
SHAPES = ((4096, 256, 768), (4096, 768, 256), (4096, 256, 256), (1024, 768, 3072))  # tokens, in, out
ROWS, LENGTH = 24, 128


def turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each side, which take turns after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if number:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in taken.items()}


def products(tokens: int, inputs: int, outputs: int, rounds: int) -> dict[str, float]:
    """Returns oneDNN's speed in torch's, forward and with the backward pass; prints operations per second."""
    torch.manual_seed(0)
    states, gradient = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    plain = nn.Linear(inputs, outputs, bias=False)
    other = nn.Linear(inputs, outputs, bias=False)
    other.load_state_dict(plain.state_dict())
    other.__class__ = OneDnnLinear

    def forward(layer: nn.Linear) -> Tensor:
        with torch.no_grad():
            return layer(states)

    def both(layer: nn.Linear) -> None:
        layer(states.requires_grad_()).backward(gradient)
        states.grad = layer.weight.grad = None

    found = {}
    for what, run, times in (("forward", forward, 1), ("forward and backward", both, 3)):
        medians = turns({"torch": lambda r=run: r(plain), "oneDNN": lambda r=run: r(other)}, rounds)
        rates = {name: times * 2 * tokens * inputs * outputs / each / 1e9 for name, each in medians.items()}
        print(
            f"{tokens} x {inputs} x {outputs}, {what}: " + ", ".join(f"{n} {r:.0f} GFLOP/s" for n, r in rates.items())
        )
        found[f"{tokens} x {inputs} x {outputs}, {what}"] = round(medians["torch"] / medians["oneDNN"], 3)
    return found


def whole(rounds: int) -> dict[str, float]:
    """Returns the same of `mini` as a whole."""
    trunk = load_model(ModelConfig(model="mini", device="cpu")).lm.base_model
    ids = torch.randint(0, 8000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.no_grad():
            trunk(input_ids=ids)

    def both() -> None:
        trunk(input_ids=ids).last_hidden_state.square().mean().backward()
        trunk.zero_grad()

    def with_torch(run: Callable[[], None]) -> Callable[[], None]:
        return lambda: (leave_onednn(trunk), run())[1]

    def with_onednn(run: Callable[[], None]) -> Callable[[], None]:
        return lambda: (use_onednn(trunk), run())[1]

    found = {}
    for what, run in (("forward of mini", forward), ("forward and backward of mini", both)):
        medians = turns({"torch": with_torch(run), "oneDNN": with_onednn(run)}, rounds)
        print(f"{what}: " + ", ".join(f"{name} {each:.3f} s" for name, each in medians.items()))
        found[what] = round(medians["torch"] / medians["oneDNN"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--force", action="store_true", help="measure although llara takes torch's product here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    taken = onednn.is_faster_here()
    print(f"{options.threads} threads; llara takes {'oneDNN' if taken else 'torch'} here")
    figures: dict[str, float] = {}
    if taken or options.force:
        onednn.is_faster_here = lambda: True
        for shape in SHAPES:
            figures |= products(*shape, options.rounds)
        figures |= whole(options.rounds)
    met = bool(figures) and all(figures[name] >= least for name, least in TARGET.items())
    print(json.dumps({"name": "linear", "figures": figures, "target": TARGET, "met": met}))


if __name__ == "__main__":
    main()
