"""Passages per second of our encoding beside sentence-transformers' `encode`, on the same texts and model.

    python benchmarks/encode.py [--rounds 3] [--shapes mini wide] [--sets passages documents] [--model DIR]

Sides, each in a process of its own, which take turns: ours in float32, in int8 (--dtype int8), and on OpenVINO in
float32 (and in bfloat16 where this CPU multiplies it); theirs in float32 at four batch sizes, of which the best counts.
All are timed from text to vectors, tokenisation included, and all texts carry the same prompt; before that, the vectors
of the shorter texts are compared with theirs.

Shapes: `mini`, and a decoder of hidden size 768 and 12 layers with random weights and `mini`'s tokenizer. Texts are
SciFact and Wikipedia: `passages` of the lengths of MS MARCO's (mean 56 words, cut at 128 tokens), and `documents` of up
to 512 tokens. Also: the share of the machine's matrix rate that our sides reach, the share of padding, and that of
tokenisation.

--model names a trained model: SciFact's test split is then searched with vectors of its float32 and int8 weights, and
with those of int8 weights kept as int8, and their nDCG@10 is compared.

sentence-transformers is no dependency of this project: pip install 'sentence-transformers==6.2.*'. LLARA_DATA names the
data folder. The last line is one JSON object.
"""

import argparse
import contextlib
import gzip
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.turns import Side, Step

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LLARA_DATA", ROOT.parent / "shared" / "data"))
TARGET = {"float32": 1.3, "int8": {"mini": 2.0, "wide": 2.5}, "nDCG@10 lost": 0.005, "padding": 0.05, "tokenising": 0.1}
OURS = {
    "float32": {},
    "int8": {"dtype": "int8"},
    "openvino float32": {"backend": "openvino"},
    "openvino bfloat16": {"backend": "openvino", "dtype": "bfloat16"},
}
BATCH_SIZES = (4, 8, 16, 32)
LENGTH = {"passages": 128, "documents": 512}
COUNT = {("mini", "passages"): 800, ("mini", "documents"): 160, ("wide", "passages"): 80, ("wide", "documents"): 16}
PROMPT = " The original sentence: </s>"  # of the template `paper`
KEPT = contextlib.ExitStack()  # what holds until a process ends
WIDE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}


def texts_of(name: str, count: int) -> list[str]:
    """Texts of mixed lengths, always the same."""
    rng = np.random.default_rng(0)
    words = [text.split() for text in _sources(count)]
    if name == "documents":
        return [" ".join(each) for each in words]
    # MS MARCO's passages: 56 words in the mean, nearly all between 20 and 120.
    sizes = np.clip(rng.normal(56, 22, len(words)), 15, 120).astype(int)
    return [" ".join(each[:size]) for each, size in zip(words, sizes.tolist(), strict=True)]


def _sources(count: int) -> Iterator[str]:
    """The first abstracts of SciFact and articles of Wikipedia, in turns."""
    paths = (DATA / "scifact" / "corpus.jsonl.gz", DATA / "wiki" / "articles.jsonl.gz")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(gzip.open(path, "rt", encoding="utf-8")) for path in paths]
        for number in range(count):
            row = json.loads(files[number % 2].readline())
            yield f"{row['title']} {row['text']}"


def make_wide(folder: Path) -> None:
    """Writes a decoder of hidden size 768 with random weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llara.hub import MINI

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    settings = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **WIDE)
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def open_ours(model: str, settings: dict[str, Any], texts: list[str], length: int) -> Any:
    """Returns what encodes the texts, and our model."""
    from llara import Retriever

    retriever = Retriever.load(model, device="cpu", template="paper", **settings)
    return lambda: retriever.encode_passages(texts, max_length=length), retriever.model


def our_side(model: str, settings: dict[str, Any], texts: list[str], length: int) -> Step:
    from llara.hardware import keep_freed_memory

    KEPT.enter_context(keep_freed_memory())  # as `llara encode` does
    encode, _ = open_ours(model, settings, texts, length)
    return lambda number: len(encode())


def open_theirs(model: str, texts: list[str], length: int) -> Any:
    from llara.hub import resolve

    warnings.filterwarnings("ignore")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    words = Transformer(str(resolve(model)), max_seq_length=length)
    parts = [words, Pooling(words.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()]
    found = SentenceTransformer(modules=parts, device="cpu").float().eval()
    # The contract of `mini` has BOS, which its tokenizer does not add by itself.
    start = found.tokenizer.bos_token if model == "mini" else ""
    prompted = [f"{start}{text}{PROMPT}" for text in texts]
    return lambda size: found.encode(prompted, batch_size=size, show_progress_bar=False)


def their_side(model: str, texts: list[str], length: int) -> Step:
    encode = open_theirs(model, texts, length)
    return lambda number: len(encode(BATCH_SIZES[number % len(BATCH_SIZES)]))


def check_equal(model: str, texts: list[str], length: int) -> None:
    """Refuses a comparison of sides that do not compute the same."""
    short = sorted(texts, key=len)[: min(16, len(texts) // 4)]  # of texts that are cut, they cut the prompt as well
    ours, theirs = open_ours(model, {}, short, length)[0](), open_theirs(model, short, length)(8)
    apart = float(np.abs(ours - theirs).max())
    if not apart < 1e-4:
        raise SystemExit(f"the sides do not compute the same vectors: {apart:.2g} apart")


def facts(model: str, texts: list[str], length: int) -> dict[str, float]:
    """Returns tokens, the share of padding, seconds of tokenisation, and operations of all matrix products."""
    from llara.batching import budget_batches, padding_share
    from llara.model import TOKEN_BUDGET

    _, opened = open_ours(model, {}, texts, length)
    began = time.perf_counter()
    rows = opened.bind().encode(texts, "passage", length)
    seconds = time.perf_counter() - began
    lengths = [len(row) for row in rows]
    config = opened.lm.config
    matrices = sum(part.weight.numel() for part in opened.lm.base_model.modules() if isinstance(part, torch.nn.Linear))
    attention = 2 * config.num_hidden_layers * config.hidden_size * sum(each**2 for each in lengths)  # causal: half
    return {
        "tokens": sum(lengths),
        "padding": padding_share(lengths, budget_batches(lengths, TOKEN_BUDGET["cpu"])),
        "tokenising, s": seconds,
        "operations": 2 * matrices * sum(lengths) + attention,
    }


def matrix_rate(rows: int = 1024, inner: int = 768, columns: int = 768) -> float:
    """Returns operations per second of a float32 product, the best of five."""
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(20):
            left @ right.T
        best = max(best, 20 * 2 * rows * inner * columns / (time.perf_counter() - began))
    return best


def sides_here() -> list[str]:
    import openvino

    names = list(OURS)
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        names.remove("openvino bfloat16")
    return names


def compare(shape: str, model: str, name: str, rounds: int) -> dict[str, float]:
    """Times all sides on one set of texts; returns figures by name."""
    texts, length = texts_of(name, COUNT[shape, name]), LENGTH[name]
    check_equal(model, texts, length)
    known = facts(model, texts, length)
    many = texts_of(name, COUNT["mini", name])  # fewer than a corpus has do not fill their batches
    known["padding"] = facts(model, many, length)["padding"]
    taken: dict[str, list[float]] = {}
    sides = {each: Side(our_side, model, OURS[each], texts, length) for each in sides_here()}
    sides["theirs"] = Side(their_side, model, texts, length)
    turns = [(each, each, 0) for each in sides if each != "theirs"]
    turns += [(f"theirs, batches of {size}", "theirs", number) for number, size in enumerate(BATCH_SIZES)]
    for label, side, number in turns:
        sides[side].step(number)  # warms up
        taken[label] = []
    for _ in range(rounds):
        for label, side, number in turns:
            taken[label].append(sides[side].step(number)[0])
    used = {each: side.close() for each, side in sides.items()}
    medians = {label: statistics.median(each) for label, each in taken.items()}
    best = min((label for label in medians if label.startswith("theirs")), key=medians.__getitem__)
    rate = matrix_rate()
    print(f"\n{shape}, {len(texts)} {name}, {known['tokens']:,} tokens of at most {length}; {rate / 1e9:.0f} GFLOP/s")
    print("| side | median s | fastest | slowest | passages/s | tokens/s | x best of theirs | of the matrix rate |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for label, each in taken.items():
        share = known["operations"] / medians[label] / rate
        row = (f"{medians[label]:.2f}", f"{min(each):.2f}", f"{max(each):.2f}", f"{len(texts) / medians[label]:.1f}")
        ratio = f"{medians[best] / medians[label]:.2f}"
        print(f"| {label} | {' | '.join(row)} | {known['tokens'] / medians[label]:,.0f} | {ratio} | {share:.2f} |")
    print("MiB above the loaded model:", ", ".join(f"{each} {value:,.0f}" for each, value in used.items()))
    figures = {f"{each} / best of theirs": medians[best] / medians[each] for each in sides if each != "theirs"}
    slowest = min(medians[each] for each in sides if each != "theirs")
    figures |= {"padding": known["padding"], "tokenising / fastest of ours": known["tokenising, s"] / slowest}
    return {f"{shape}, {name}: {key}": round(value, 4) for key, value in figures.items()}


def quality(model: str) -> dict[str, float]:
    """Returns nDCG@10 on SciFact's test split of vectors of float32 weights, of int8 ones, and of these as int8."""
    from llara.config import EncodeConfig, EvaluateConfig, IndexConfig, SearchConfig
    from llara.encoding.encode import encode
    from llara.evaluate import evaluate
    from llara.index.build import build_index
    from llara.search import search

    corpus, found = DATA / "scifact", {}
    for name, settings in {
        "float32": {},
        "int8": {"dtype": "int8"},
        "int8, stored as int8": {"dtype": "int8", "vector_dtype": "int8"},
    }.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            encode(EncodeConfig(model=model, device="cpu", corpus=(corpus,), output=folder / "vectors", **settings))
            build_index(IndexConfig(vectors=folder / "vectors", output=folder / "index"))
            run, dtype = folder / "run.trec", settings.get("dtype", "float32")
            search(
                SearchConfig(
                    model=model,
                    device="cpu",
                    dtype=dtype,
                    index=folder / "index",
                    queries=corpus,
                    split="test",
                    output=run,
                )
            )
            result = evaluate(EvaluateConfig(run=(run,), qrels=corpus, metrics=("nDCG@10",), permutations=1))
            found[name] = result.means[result.runs[0]]["nDCG@10"]
        print(f"SciFact test, weights {name}: nDCG@10 {found[name]:.4f}", flush=True)
    lost = {name: round(found["float32"] - value, 5) for name, value in found.items() if name != "float32"}
    return {f"nDCG@10 lost, {name}": value for name, value in lost.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="*", choices=("mini", "wide"), default=["mini", "wide"])
    parser.add_argument("--sets", nargs="*", choices=tuple(LENGTH), default=list(LENGTH))
    parser.add_argument("--model", help="a trained model, for nDCG@10")
    given = parser.parse_args()
    if given.shapes and importlib.util.find_spec("sentence_transformers") is None:
        raise SystemExit("the other side is missing: pip install 'sentence-transformers==6.2.*'")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as made:
        wide = Path(made) / "wide"
        if "wide" in given.shapes:
            make_wide(wide)
        for shape in given.shapes:
            for name in given.sets:
                figures |= compare(shape, "mini" if shape == "mini" else str(wide), name, given.rounds)
    if given.model:
        figures |= quality(given.model)
    print(json.dumps({"name": "encode", "figures": figures, "target": TARGET, "met": met(figures)}))


def met(figures: dict[str, float]) -> bool:
    """Tells whether every figure that was measured meets its target; of float32, the best of our two sides counts."""
    sound = []
    for key, value in figures.items():
        where, _, what = key.partition(": ")
        if what.startswith("int8 /"):
            sound.append(value >= TARGET["int8"][where.partition(",")[0]])
        elif what.startswith("float32 /"):
            sound.append(max(value, figures[f"{where}: openvino float32 / best of theirs"]) >= TARGET["float32"])
        elif what == "padding":
            sound.append(value <= TARGET["padding"])
        elif what.startswith("tokenising"):
            sound.append(value <= TARGET["tokenising"])
        elif key.startswith("nDCG@10 lost"):
            sound.append(value <= TARGET["nDCG@10 lost"])
    return bool(sound) and all(sound)


if __name__ == "__main__":
    sys.exit(main())
