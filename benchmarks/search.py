"""How soon a search answers: the first query of a process that starts, and those that follow, beside other ways.

    python benchmarks/search.py [--corpus FILE --queries FILE] [--work DIR] [--runs 5] [--count 51]

The corpus (by default SciFact's 5,183 abstracts, in the folder `shared` beside the project, or LLARA_SHARED) is encoded
with `mini` and indexed in DIR, once. Three sides then answer the same queries over the same
vectors, each as a process that reads a query per line and prints the ids of its ten best documents:

    llara      llara search --interactive --json, as it is
    st         sentence-transformers: encode, and its semantic_search over the vectors
    bare       transformers' forward pass, a matrix product and torch.topk, and nothing else

Cold is the time from the start of the process to its first answer, imports and model included; warm is that of each
further query, sent when the one before was answered. The sides take turns, process by process and query by query. A
query's first hits must be the same on all sides. llara's answers hold titles and snippets, the others ids alone.

sentence-transformers is no dependency of this project; without it that side is left out. The last line is one JSON
object.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = {"cold": 6.0, "warm": 0.05}  # seconds: the first answer, and 50 and 95 of 100 further ones
SCIFACT = Path(os.environ.get("LLARA_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "scifact"
SUFFIX = " The next sentence: "  # what the template `paper` puts behind a query, before the EOS token
TOP = 10


class Process:
    """One side, started when it is made; `ask` sends a query and waits for its line."""

    def __init__(self, command: list[str]) -> None:
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, query: str) -> list[str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(query + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer if isinstance(answer, list) else [each["id"] for each in answer["answers"]]

    def cpu_seconds(self) -> float:
        """Seconds of processor time so far, of all threads: what other work on the machine changes least. Linux."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(60):
            raise SystemExit(f"a side ended with {self._process.returncode}")


def commands(work: Path) -> dict[str, list[str]]:
    llara = [sys.executable, "-m", "llara", "search", "--interactive", "--json", "--quiet", "--device", "cpu"]
    sides = {"llara": [*llara, "--index", str(work / "index"), "--top-k", str(TOP)]}
    if importlib.util.find_spec("sentence_transformers"):
        sides["st"] = [sys.executable, __file__, "--child", "st", "--work", str(work)]
    return sides | {"bare": [sys.executable, __file__, "--child", "bare", "--work", str(work)]}


def prepare(corpus: Path, work: Path) -> None:
    """Encodes and indexes the corpus, where that is not done yet; writes the ids beside the vectors for the others."""
    from llara.config import EncodeConfig, IndexConfig
    from llara.encoding.encode import encode
    from llara.encoding.shards import Vectors
    from llara.index.build import build_index

    encode(EncodeConfig(model="mini", corpus=(corpus,), output=work / "vectors", device="cpu"))
    build_index(IndexConfig(vectors=work / "vectors", output=work / "index"))
    vectors = Vectors.open(work / "vectors")
    (work / "ids.json").write_text(json.dumps(vectors.documents.ids()))


def child(side: str, work: Path) -> None:
    """Answers the lines of stdin with lines of ids; everything is imported here, as a script of one's own would."""
    import numpy as np
    import torch

    ids = json.loads((work / "ids.json").read_text())
    shards = sorted((work / "vectors").glob("shard-?????.npy"))
    vectors = torch.from_numpy(np.concatenate([np.load(shard) for shard in shards]))
    find = (with_sentence_transformers if side == "st" else with_bare_parts)(vectors)
    for line in sys.stdin:
        print(json.dumps([ids[place] for place in find(line.strip())]), flush=True)


def mini() -> str:
    import llara

    return str(Path(llara.__file__).parent / "assets" / "mini")


def with_sentence_transformers(vectors: Any) -> Callable[[str], list[int]]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from sentence_transformers.util import semantic_search

    words = Transformer(mini(), max_seq_length=512)
    parts = [words, Pooling(words.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()]
    model = SentenceTransformer(modules=parts, device="cpu").float()
    bos, eos = model.tokenizer.bos_token, model.tokenizer.eos_token

    def find(query: str) -> list[int]:
        vector = model.encode([bos + query + SUFFIX + eos], convert_to_tensor=True, show_progress_bar=False)
        (hits,) = semantic_search(vector, vectors, top_k=TOP)
        return [hit["corpus_id"] for hit in hits]

    return find


def with_bare_parts(vectors: Any) -> Callable[[str], list[int]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(mini())
    model = AutoModelForCausalLM.from_pretrained(mini(), dtype=torch.float32).eval().base_model

    def find(query: str) -> list[int]:
        with torch.inference_mode():
            inputs = tokenizer([tokenizer.bos_token + query + SUFFIX + tokenizer.eos_token], return_tensors="pt")
            state = model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state[0, -1]
            return (vectors @ torch.nn.functional.normalize(state, dim=-1)).topk(TOP).indices.tolist()

    return find


def measure(sides: dict[str, list[str]], queries: list[str], runs: int) -> tuple[Any, Any, Any, int]:
    """Returns seconds by side, cold, of processors until then, and warm; and for how many queries all sides agreed."""
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    cold: dict[str, list[float]] = {name: [] for name in sides}
    warm: dict[str, list[float]] = {name: [] for name in sides}
    same = 0
    for run in range(runs + 1):
        opened = {}
        for name, command in sides.items():
            opened[name] = Process(command)
            opened[name].ask(queries[0])
            if run:  # the first round fills the caches of disk and bytecode
                cold[name].append(time.perf_counter() - opened[name].began)
                cpu[name].append(opened[name].cpu_seconds())
        for query in queries[1:]:
            firsts = set()
            for name, process in opened.items():
                began = time.perf_counter()
                firsts.add(process.ask(query)[0])
                if run:
                    warm[name].append(time.perf_counter() - began)
            same += not run and len(firsts) == 1
        for process in opened.values():
            process.close()
    return cold, cpu, warm, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=SCIFACT / "corpus.jsonl.gz", help="as llara encode takes it")
    parser.add_argument("--queries", type=Path, default=SCIFACT / "queries.jsonl", help="as llara search takes them")
    parser.add_argument("--work", type=Path, help="where vectors and index are, or will be; default: a new folder")
    parser.add_argument("--count", type=int, default=51, help="queries")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", choices=("st", "bare"))
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.work)
    if not (args.corpus.exists() and args.queries.exists()):
        return print(f"search: {args.corpus} and {args.queries} are not here; give --corpus and --queries")
    with tempfile.TemporaryDirectory() as made:
        run(args, args.work or Path(made))


def run(args: argparse.Namespace, work: Path) -> None:
    from llara.data import read_queries

    prepare(args.corpus, work)
    queries = [" ".join(query.text.split()) for query in read_queries(args.queries)[: args.count]]
    sides = commands(work)
    cold, cpu, warm, same = measure(sides, queries, args.runs)
    figures: dict[str, float] = {}
    for name in sides:
        p95 = statistics.quantiles(warm[name], n=20)[-1]
        figures[f"{name}: cold"] = round(statistics.median(cold[name]), 3)
        figures[f"{name}: cold, processor"] = round(statistics.median(cpu[name]), 3)
        figures[f"{name}: warm median"] = round(statistics.median(warm[name]), 5)
        figures[f"{name}: warm p95"] = round(p95, 5)
        spread = f"{min(cold[name]):.2f} to {max(cold[name]):.2f}"
        print(f"{name:<6} cold median {statistics.median(cold[name]):.2f} s ({spread}, {args.runs} runs), ", end="")
        print(f"{statistics.median(cpu[name]):.2f} s of processors; ", end="")
        print(f"warm median {1000 * statistics.median(warm[name]):.1f} ms, p95 {1000 * p95:.1f} ms")
    print(f"load average {' '.join(f'{each:.1f}' for each in os.getloadavg())} on {os.cpu_count()} processors")
    print(f"the same first hit on all sides: {same} of {len(queries) - 1} queries")
    if same < 0.98 * (len(queries) - 1):
        raise SystemExit("the sides do not search the same")
    met = figures["llara: cold"] <= TARGET["cold"] and figures["llara: warm p95"] <= TARGET["warm"]
    print(json.dumps({"name": "search", "figures": figures, "target": TARGET, "met": met}))


if __name__ == "__main__":
    main()
