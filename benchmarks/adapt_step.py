"""How fast one adaptation step is, and how much memory it takes, beside a straightforward one on the same model.

    python benchmarks/adapt_step.py [--runs 7] [--shapes llama-32k mini llama-128k] [--threads 2] [--template paper]

A step is forward, backward, clipping and AdamW over 32 texts of 128 tokens (8 under the vocabulary of 128k). The
reference step is written as the released LLARA code goes about it: one pass under a dense float mask, float32 logits of
every position, and a loop over texts for the targets, through torch's own products (or, with `--reference-products
ours`, through those that we take). Both give the same losses, which is checked first. Each side runs in a process of
its own, and they take turns, so that a busy moment of the machine hits all of them; on a machine that stays busy,
`--clock cpu --threads 1` counts processor time instead. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common.turns import CLOCKS, Side, Step
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llara.batching import budget_batches
from llara.config import ModelConfig
from llara.hardware import keep_freed_memory
from llara.loading import load_model
from llara.model import TOKEN_BUDGET, EmbeddingModel
from llara.onednn import leave_onednn, multiplies, product, use_onednn
from llara.templates import load_template
from llara.training.layers import compile_layers
from llara.training.objective import AdaptModule, Plan, Prompts, collate
from llara.training.trainer import Batch

# Texts of a step and their tokens. Under the large vocabulary the reference would take 11 GB for 32 of them.
ROWS, LENGTH = {"llama-32k": 32, "mini": 32, "llama-128k": 8}, 128
# The smallest LLaMA in wide use as a test bed, and the same trunk under the vocabulary of a present-day tokenizer.
SHAPES = {"llama-32k": 32_016, "mini": 0, "llama-128k": 128_256}
LLAMA = {
    **{"hidden_size": 288, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6},
    **{"intermediate_size": 768, "max_position_embeddings": 512, "tie_word_embeddings": False},
}
# Operators by what they are for; all others of aten work on each number by itself, or move them.
KINDS = {
    "products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "optimizer": ("aten::_fused_adamw_", "aten::_foreach_norm", "aten::_foreach_mul_"),
    "softmax": ("aten::_softmax", "aten::_log_softmax", "aten::logsumexp", "aten::exp", "aten::exp_"),
}
KEPT = contextlib.ExitStack()  # what holds until a process ends
SIDES = ("ours", "ours + lm", "reference", "reference + lm")
TARGET = {
    "steps/s, without the language-model term": ("least", 2.2),
    "steps/s, with it": ("least", 2.5),
    "steps/s, where the reference computes it and ours does not need it": ("least", 4.0),
    "memory above the loaded model": ("most", 0.5),
    "paper template / forward and backward of the bare trunk": ("most", 1.35),
}


class Bench:
    """One model, one batch, and every side's step on them."""

    def __init__(self, shape: str, template: str, token_budget: int | None) -> None:
        torch.manual_seed(0)
        self.rows = ROWS[shape]
        self.model = make_model(shape, template)
        bound, tokenizer = self.model.bind(), self.model.tokenizer
        self.prompts = Prompts(bound.passage, bound.query, self.model.pad_id, tuple(tokenizer.all_special_ids))
        self.scale = self.model.contract.template.loss_scale
        self.budget = token_budget or TOKEN_BUDGET["cpu"]
        rng = np.random.default_rng(0)
        self.texts, self.next_texts = ([self._text(rng) for _ in range(self.rows)] for _ in range(2))
        self.width = (
            len(self.prompts.self_side.prefix)
            + LENGTH
            + sum(len(side.suffix) for side in (self.prompts.self_side, self.prompts.next_side))
        )
        self.ids = collate(self.texts, self.next_texts, self.prompts, self.plan(0.0))["shared"]
        self.optimizer = torch.optim.AdamW(self.model.lm.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.model.lm.train()

    def _text(self, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids with the long tail that text has, above the special tokens."""
        vocabulary = self.model.lm.config.vocab_size
        return np.minimum((rng.pareto(1.0, LENGTH) * 20).astype(np.int64) + 8, vocabulary - 1)

    def plan(self, lm_weight: float) -> Plan:
        return Plan("ebae+ebar", True, self.scale, lm_weight)

    def passes(self, lm_weight: float) -> list[Batch]:
        """The batch as training cuts it."""
        cut = budget_batches([self.width] * self.rows, self.budget)
        return [
            collate([self.texts[row] for row in rows], [self.next_texts[row] for row in rows], self.prompts, plan)
            for rows in cut
            for plan in (self.plan(lm_weight),)
        ]

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.lm.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ours(self, lm_weight: float) -> float:
        """Our step, collating included; returns its loss."""
        module = AdaptModule(self.model, self.prompts, self.plan(lm_weight))
        passes = self.passes(lm_weight)
        counts = torch.stack([batch["counts"] for batch in passes]).sum(dim=0)
        total = 0.0
        for batch in passes:
            loss, _ = module(batch, counts)
            loss.backward()
            total += float(loss.detach())
        self.update()
        return total

    def trunk(self) -> float:
        """Forward and backward of the trunk alone on the same tokens, cut likewise, under its own causal mask."""
        for rows in budget_batches([self.width] * self.rows, self.budget):
            self.model.trunk(input_ids=self.ids[torch.from_numpy(rows)], attention_mask=None).sum().backward()
        self.optimizer.zero_grad()
        return 0.0

    def reference(self, lm_weight: float) -> float:
        """The straightforward step; returns its loss."""
        sides = (self.prompts.self_side, self.prompts.next_side)
        mask, position_ids = self._dense_mask()
        output = self.model.lm(input_ids=self.ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        logits = output.logits.float()
        loss = torch.zeros(())
        ends = (self.width - len(sides[1].suffix), self.width)
        for side, end, targets in zip(sides, ends, (self.texts, self.next_texts), strict=True):
            joined = logits[:, end - side.slots : end, :].max(dim=1).values
            log_probabilities = torch.log_softmax(joined, dim=1)
            total = torch.zeros(())
            for row, target in zip(log_probabilities, targets, strict=True):
                wanted = torch.unique(torch.from_numpy(target))
                total = total - row[wanted].mean()
            loss = loss + self.scale * total / self.rows / 2
        if lm_weight:
            loss = loss + lm_weight * F.cross_entropy(
                logits[:, :-1, :].contiguous().flatten(0, 1), self._labels()[:, 1:].contiguous().flatten()
            )
        loss.backward()
        self.update()
        return float(loss.detach())

    def _dense_mask(self) -> tuple[Tensor, Tensor]:
        own, other = len(self.prompts.self_side.suffix), len(self.prompts.next_side.suffix)
        hidden = torch.finfo(torch.float32).min
        mask = torch.full((self.width, self.width), hidden).triu(1)
        mask[-other:, -other - own : -other] = hidden
        position_ids = torch.arange(self.width)
        position_ids[-other:] -= own
        return mask.expand(self.rows, 1, -1, -1).clone(), position_ids.expand(self.rows, -1)

    def _labels(self) -> Tensor:
        labels = self.ids.clone()
        labels[:, : max(len(self.prompts.self_side.prefix), 1)] = -100
        labels[:, len(self.prompts.self_side.prefix) + LENGTH :] = -100
        return labels

    def sides(self) -> dict[str, Callable[[], float]]:
        return {
            "ours": lambda: self.ours(0.0),
            "ours + lm": lambda: self.ours(1.0),
            "reference": lambda: self.reference(0.0),
            "reference + lm": lambda: self.reference(1.0),
            "trunk": self.trunk,
        }

    def flops(self, lm_weight: float) -> float:
        """Multiplications and additions of our step: 6 per weight and token, attention, and the head where it runs."""
        lm, settings = self.model.lm, self.model.lm.config
        matrices = sum(each.numel() for layer in lm.model.layers for each in layer.parameters() if each.dim() == 2)
        rows = sum(side.slots for side in (self.prompts.self_side, self.prompts.next_side)) * self.rows
        rows += (LENGTH + len(self.prompts.self_side.prefix) - 1) * self.rows if lm_weight else 0
        attention = 12 * self.rows * self.width**2 * settings.hidden_size * settings.num_hidden_layers
        return (
            6.0 * matrices * self.rows * self.width
            + attention
            + 6.0 * rows * settings.vocab_size * settings.hidden_size
        )


def make_model(shape: str, template: str) -> EmbeddingModel:
    mini = load_model(ModelConfig(model="mini", template=template), for_training=True, new_template=True)
    if not SHAPES[shape]:
        return mini
    config = AutoConfig.for_model("llama", vocab_size=SHAPES[shape], **LLAMA)
    # mini's tokenizer binds the template: a prompt is as long as there, and its ids stand in any vocabulary.
    return EmbeddingModel(AutoModelForCausalLM.from_config(config), mini.tokenizer, mini.contract, shape, shape)


def rate(clock: Callable[[], float]) -> float:
    """Returns the machine's float32 matrix rate now, in flop/s: the best of large products of several shapes.

    Through torch's own product and, where llara takes it, oneDNN's.
    """
    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (4096, 1024, 1024), (1024, 1024, 4096)):
        left, right = torch.randn(rows, inner), torch.randn(columns, inner)
        ways = [F.linear, product] if multiplies(left, right) else [F.linear]
        for way in ways * 4:
            began = clock()
            way(left, right)
            best = max(best, 2.0 * rows * inner * columns / (clock() - began))
    return best


def shares(bench: Bench, lm_weight: float) -> dict[str, float]:
    """Returns what the time of our step goes into, as torch's profiler sees it, which itself costs a few per cent.

    "overhead" is what no operator takes: Python, and autograd's engine.
    """
    with keep_freed_memory():
        for _ in range(2):
            bench.ours(lm_weight)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            began = time.perf_counter()
            bench.ours(lm_weight)
            whole = time.perf_counter() - began
    spent: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        if event.key.startswith(("aten::", "mkldnn::")):
            kind = next((kind for kind, names in KINDS.items() if event.key in names), "elementwise")
            spent[kind] += event.self_cpu_time_total / 1e6
    spent["overhead"] = max(whole - sum(spent.values()), 0.0)
    return {kind: round(seconds / whole, 4) for kind, seconds in spent.items()}


def open_side(name: str, shape: str, template: str, budget: int | None, compiled: bool, products: str) -> Step:
    """Returns the step of one side, for a process of its own."""
    bench = Bench(shape, template, budget)
    if name.startswith("ours"):
        KEPT.enter_context(keep_freed_memory())  # as every training run does on a CPU
        if compiled:
            compile_layers(AdaptModule(bench.model, bench.prompts, bench.plan(0.0)), shape)
    if name.startswith("reference"):
        (leave_onednn if products == "torch" else use_onednn)(bench.model.lm)
    elif not compiled:
        use_onednn(bench.model.lm.base_model)
    step = bench.sides()[name]
    return lambda number: step()


def times(shape: str, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float], float]:
    """Returns each side's seconds per step and its memory, the sides taking turns, and the matrix rate between them."""
    settings = (shape, options.template, options.token_budget, options.compile, options.reference_products)
    sides = {name: Side(open_side, name, *settings, threads=options.threads) for name in (*SIDES, "trunk")}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    rates = []
    for round_ in range(options.runs + 2):
        rates.append(rate(CLOCKS[options.clock]))
        for name, side in sides.items():
            seconds, _ = side.step(round_, options.clock)
            if round_ > 1:  # the first fill caches, make the optimizer's state, and compile
                taken[name].append(seconds)
    return taken, {name: side.close() for name, side in sides.items()}, statistics.median(rates)


def check_losses(bench: Bench) -> None:
    """Both sides compute the same thing, or a comparison of their speed would mean nothing."""
    for name in ("ours", "ours + lm"):
        state = {key: value.clone() for key, value in bench.model.lm.state_dict().items()}
        found = bench.sides()[name]()
        bench.model.lm.load_state_dict(state)
        expected = bench.sides()[name.replace("ours", "reference")]()
        bench.model.lm.load_state_dict(state)
        assert abs(found - expected) <= 1e-5 * abs(expected), (name, found, expected)


def measure(shape: str, options: argparse.Namespace) -> dict[str, float]:
    """Prints one shape's table and returns its figures."""
    bench = Bench(shape, options.template, options.token_budget)
    check_losses(bench)
    use_onednn(bench.model.lm.base_model)
    parts = {name: shares(bench, weight) for name, weight in (("ours", 0.0), ("ours + lm", 1.0))}
    taken, used, machine = times(shape, options)
    median = {name: statistics.median(each) for name, each in taken.items()}
    print(
        f"\n{shape}: vocabulary {bench.model.lm.config.vocab_size:,}, {bench.rows} x {bench.width} tokens in passes of "
        f"{bench.budget:,}; matrix rate {machine / 1e9:.0f} GFLOP/s"
    )
    print(f"{'side':<16}{'median s':>10}{'from':>8}{'to':>8}{'tokens/s':>10}{'of rate':>9}{'MiB':>8}")
    for name, each in taken.items():
        tokens = bench.rows * bench.width / median[name]
        flops = {"ours": bench.flops(0.0), "ours + lm": bench.flops(1.0)}.get(name)
        share = f"{flops / median[name] / machine:.0%}" if flops else ""
        print(
            f"{name:<16}{median[name]:>10.3f}{min(each):>8.3f}{max(each):>8.3f}{tokens:>10.0f}{share:>9}{used[name]:>8.0f}"
        )
    for name, spent in parts.items():
        print(
            f"{name}: "
            + ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(spent.items(), key=lambda each: -each[1]))
        )
    keys = list(TARGET)
    figures = {
        keys[0]: median["reference"] / median["ours"],
        keys[1]: median["reference + lm"] / median["ours + lm"],
        keys[2]: median["reference + lm"] / median["ours"],
        keys[4]: median["ours"] / median["trunk"],
        "share of the matrix rate": bench.flops(0.0) / median["ours"] / machine,
        "share of the matrix rate, with the language-model term": bench.flops(1.0) / median["ours + lm"] / machine,
        **{f"seconds, {name}": value for name, value in median.items()},
    }
    figures[keys[3]] = used["ours"] / used["reference"]
    figures[f"{keys[3]}, with the language-model term"] = used["ours + lm"] / used["reference + lm"]
    figures |= {f"MiB, {name}": value for name, value in used.items()}
    figures |= {f"share of {kind}, {name}": share for name, spent in parts.items() for kind, share in spent.items()}
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--template", choices=("paper", "release"), default="paper")
    parser.add_argument("--token-budget", type=int, help="tokens of a forward pass; default: as in training")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--reference-products", choices=("torch", "ours"), default="torch", help="ours: oneDNN's, where we take them"
    )
    parser.add_argument("--compile", action="store_true", help="our side with a compiled trunk")
    options = parser.parse_args()
    load_template(options.template)
    torch.set_num_threads(options.threads)
    figures = {shape: measure(shape, options) for shape in options.shapes}
    judged = figures[options.shapes[0]]
    verdicts = {
        name: judged[name] >= bound if kind == "least" else judged[name] <= bound
        for name, (kind, bound) in TARGET.items()
    }
    for name, met in verdicts.items():
        print(f"{'met' if met else 'MISSED'}: {name}: {judged[name]:.2f}, at {' '.join(map(str, TARGET[name]))}")
    target = {name: f"at {kind} {bound}" for name, (kind, bound) in TARGET.items()}
    print(json.dumps({"name": "adapt_step", "figures": figures, "target": target, "met": all(verdicts.values())}))


if __name__ == "__main__":
    main()
