"""The configurations of the training stages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from llara.config.base import SEED_MAX, ModelConfig, pair_length_problems


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """What both training stages take."""

    output: Path
    """Folder of the trained model; until the run ends, checkpoints and log lie beside it, in OUTPUT.partial."""
    steps: int | None = None
    """Optimizer steps; default: what --epochs comes to."""
    epochs: float = 1.0
    """Passes over the training data, where --steps is not given."""
    batch_size: int = 32
    """Chunks (adapt) or queries (finetune) per batch."""
    accumulation: int = 1
    """Batches per optimizer step and process."""
    token_budget: int | None = None
    """Tokens per forward pass, padding included; default: 1024 on a CPU, whose caches it fits, 16384 on a GPU.
    It decides how a batch is cut into passes, so memory and speed, and not what is learned."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the others again in the backward pass: a fraction of the memory, for a
    third more time. Gradients stay the same."""
    compile: bool = False
    """Compile the model's layers: takes half a minute or more before the first step and, on a CPU, a C++ compiler; then
    saves a tenth of a step's time on a CPU and more on a GPU. Pays in runs of some hundred steps and more."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""
    lora_rank: int = 0
    """Rank of LoRA; 0 trains all weights."""
    lora_alpha: int = 16
    """Scale of LoRA: its update is multiplied by alpha / rank."""
    lora_dropout: float = 0.1
    """Dropout inside LoRA."""
    lora_modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear maps that get LoRA; `all-linear` means all but the LM head."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: hold the base model in 4 bits while LoRA is trained (QLoRA), on a GPU; the saved model is whole again."""
    seed: int = 42
    """Seed of sampling, dropout and new weights."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept while training."""
    log_every: int = 10
    """Steps between log lines."""
    measure_every: int = 100
    """Steps between measurements on held-out text, where the job has some; the last step is always measured."""
    report_to: tuple[str, ...] = ()
    """Logging integrations of transformers: tensorboard, wandb, trackio."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = super().problems()
        if self.dtype == "float16":
            problems.append("--dtype: float16 cannot be trained without loss scaling; use float32, bfloat16 or auto")
        if self.dtype == "int8":
            problems.append("--dtype: int8 weights have no gradient; train in float32 or bfloat16")
        if self.backend != "torch":
            problems.append(f"--backend: {self.backend} only runs models; training takes torch")
        if self.device.startswith("cuda:") and self.device != "cuda:0":
            problems.append(
                f"--device: training takes the first GPU; choose one with CUDA_VISIBLE_DEVICES={self.device[5:]}"
            )
        if self.quantize != "none" and not self.lora_rank:
            problems.append("--quantize: weights of 4 bits cannot be trained; train LoRA with --lora-rank 64")
        return [
            *problems,
            *([] if self.model else ["--model: is required (a folder, a hub id, or mini)"]),
            *self._at_least(1, "steps", "batch_size", "accumulation", "token_budget"),
            *self._at_least(1, "save_every", "keep", "log_every", "measure_every"),
            *self._at_least(0, "learning_rate", "weight_decay", "max_grad_norm", "lora_rank"),
            *self._above_zero("epochs"),
            *self._within(0, 1, "warmup", "lora_dropout"),
            *self._within(0, SEED_MAX, "seed"),
            *self._lora_problems(),
        ]

    def _lora_problems(self) -> list[str]:
        problems = self._only_with(self.lora_rank > 0, "--lora-rank", "lora_alpha", "lora_dropout", "lora_modules")
        if self.lora_alpha < 1:
            problems.append(f"--lora-alpha: must be 1 or more, got {self.lora_alpha}")
        if self.lora_dropout == 1:
            problems.append("--lora-dropout: 1 leaves nothing to learn from; give less")
        if not self.lora_modules:
            problems.append("--lora-modules: is empty; name linear maps, or leave it at all-linear")
        return problems


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(TrainConfig):
    """Stage 1: EBAE + EBAR on plain text, no labels."""

    corpus: tuple[Path, ...]
    """Plain text, JSON lines, tsv, parquet or a BEIR folder; several are read one after the other."""
    deduplicate: bool = True
    """Leave out documents whose title and text are an exact copy of an earlier one's."""
    objective: Literal["ebae+ebar", "ebae", "ebar", "lm"] = "ebae+ebar"
    """ebae predicts the text's own tokens, ebar those of the next text; lm is plain language modelling (a baseline)."""
    chunk_length: int = 128
    """Tokens of text per chunk at most, template not counted."""
    min_chunk_length: int = 16
    """Shorter chunks at the end of a document are not trained on; they still serve as a next text."""
    cut: Literal["sentence", "token"] = "sentence"
    """sentence: chunks end where a sentence does, in any language; token: each but the last has --chunk-length tokens.
    A sentence is cut where it is longer than a chunk, or would leave one shorter than --min-chunk-length."""
    max_chunks: int | None = None
    """Train on a seeded sample of this many chunks."""
    held_out: int = 64
    """Chunks, in whole documents, that are not trained on but measured; at most a tenth of the corpus. 0: none."""
    targets: Literal["no-stopwords", "unique", "all", "idf"] = "no-stopwords"
    """no-stopwords: the set of tokens of the target text, without stop words and punctuation; unique: the whole set,
    as published; all: every token, repeats counted; idf: the set, each token weighted by how few documents of the
    corpus hold it."""
    language: str = "english"
    """Language of the stop words of --targets no-stopwords. A corpus in another loses its punctuation, and words that
    are spelled like one of them."""
    loss_scale: float | None = None
    """Factor on the EBAE and EBAR losses; default: the template's (paper 1, release 0.1)."""
    lm_weight: float = 0.0
    """Weight of an added language-model loss on the text."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Put several texts into one row, which leaves no padding. auto: on a GPU, under FlexAttention, where this model
    gives the same there; on: or stop with the reason, and on a CPU under a dense mask, which is slower than padding."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        alone = (
            [] if self.objective != "lm" or not self.lm_weight else ["--lm-weight: adds to ebae and ebar, not to lm"]
        )
        return [
            *super().problems(),
            *alone,
            *([] if self.corpus else ["--corpus: is required"]),
            *self._at_least(1, "chunk_length", "min_chunk_length", "max_chunks"),
            *self._at_least(0, "lm_weight", "loss_scale", "held_out"),
            *self._only_with(self.targets == "no-stopwords", "--targets no-stopwords", "language"),
            *self._chunk_problems(),
        ]

    def _chunk_problems(self) -> list[str]:
        problems = []
        if 0 < self.chunk_length < self.min_chunk_length:
            given = f"{self.min_chunk_length} is more than --chunk-length {self.chunk_length}"
            problems.append(f"--min-chunk-length: {given}, so no chunk is long enough to be trained on; give less")
        if self.objective != "lm" and self.loss_scale == 0 and not self.lm_weight:
            problems.append("--loss-scale: 0 leaves nothing to train on without --lm-weight")
        return problems


# Settings of fine-tuning that speak of vectors, which a reranker does not make.
_OF_VECTORS = {
    *("temperature", "margin", "relative_margin", "distill", "matryoshka_dims", "query_prompts", "passage_prompts"),
    *("dev_passages", "quantize"),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Stage 2: contrastive learning on queries, relevant passages and hard negatives."""

    task: Literal["retrieve", "rerank"] = "retrieve"
    """retrieve: a query's vector is to lie near those of its passages. rerank: the model gets a score head, and a
    query's relevant passage is to score above its hard negatives, read together with the query (RankLLaMA); its
    templates are rankllama (default), rankllama-v1, or a TOML file of your own."""
    train: tuple[Path, ...]
    """JSON lines with query, pos, neg; Tevatron's two layouts; a .tsv of pairs, triples or judgements; or a collection
    (BEIR folder, pairs file, SQuAD JSON). Each path is a set of its own; given several times, it counts as often."""
    split: str = "train"
    """Split of the collections given as --train. Of a BEIR folder without dev.tsv, a fifth of the queries of `train` is
    held back as `dev`; `train-all` takes all of them. SQuAD JSON has only `test`."""
    corpus: tuple[Path, ...] = ()
    """The documents that rows of --train and --dev name by id."""
    queries: Path | None = None
    """The queries that rows of --train and --dev name by id; with --corpus, the columns of every .tsv are ids."""
    query_prompts: tuple[str, ...] = ()
    """Text in front of the queries: one for all sets, or one for each in the order of --train. It is part of the text,
    so put the same in front of the queries that are searched with."""
    passage_prompts: tuple[str, ...] = ()
    """Text in front of the passages, as --query-prompts."""
    mixing: float = 1.0
    """Sets are drawn in proportion to size ** mixing: 1 draws every example as often as any other, 0 every set."""
    homogeneous: bool = True
    """Take all examples of a batch from one set: passages of another set are too easy as negatives."""
    negatives: int = 7
    """Hard negatives per query, drawn anew each epoch; queries that have fewer use what they have."""
    temperature: float = 0.01
    """Scores are divided by this before the softmax."""
    margin: float | None = None
    """Leave out negatives that score above the positive's score minus this: they are likely relevant. Cosines."""
    relative_margin: float | None = None
    """The same, as a share of the positive's score: 0.05 leaves out what scores above 95 % of it."""
    distill: Literal["none", "kl", "margin-mse"] = "none"
    """Learn the scores that a teacher gave in pos_scores and neg_scores: kl compares softmaxes over a query's own
    passages, margin-mse the distances between its positive and its negatives."""
    distill_weight: float = 1.0
    """Weight of --distill in the loss."""
    contrast_weight: float = 1.0
    """Weight of the contrastive loss; 0 with --distill learns from the teacher alone."""
    teacher_temperature: float = 1.0
    """The teacher's scores are divided by this before the softmax of --distill kl."""
    matryoshka_dims: tuple[int, ...] = ()
    """Train the first so many dimensions of a vector to be a good vector, too; the whole vector always is."""
    matryoshka_weights: tuple[float, ...] = ()
    """Weight of each of --matryoshka-dims; default: 1, as the whole vector has."""
    graph_budget: int | None = None
    """Tokens of a batch whose activations are kept for the backward pass; the rest is encoded twice (GradCache), so
    that memory does not grow with the batch. Default: 4096 on a CPU, one pass on a GPU. It decides memory and speed."""
    dev: tuple[Path, ...] = ()
    """Held-out examples in any layout that --train takes: every --measure-every steps their loss, nDCG@10 and MRR@10
    are measured, and the weights of the best step by nDCG@10 are those that are saved. With --task rerank a query's own
    documents are ordered, those of neg among them."""
    dev_split: str = "dev"
    """Split of the collections given as --dev."""
    dev_queries: int = 256
    """Queries of --dev that are measured, drawn with the seed."""
    dev_passages: int = 2048
    """Passages that each of them is ranked against: those of the dev queries, then of other examples."""
    patience: int = 0
    """Stop after so many measurements without a better one; 0: train to the end."""
    query_length: int | None = None
    """Tokens of a query, prompt included; default: what the model folder says, else 64."""
    passage_length: int | None = None
    """Tokens of a passage, prompt included; default: what the model folder says, else 160."""
    length: int | None = None
    """With --task rerank: tokens of query and passage together; default: what the model folder says, else 256."""
    titles: bool = True
    """Put the title in front of a passage, here and, through the model folder, everywhere after."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [
            *super().problems(),
            *([] if self.train else ["--train: is required"]),
            *self._at_least(0, "negatives", "mixing", "margin", "distill_weight", "contrast_weight", "graph_budget"),
            *self._at_least(0, "patience"),
            *self._at_least(1, "query_length", "passage_length", "length", "dev_queries", "dev_passages"),
            *self._within(0, 1, "relative_margin"),
            *self._above_zero("temperature", "teacher_temperature"),
            *self._set_problems(),
            *self._loss_problems(),
            *self._task_problems(),
        ]

    def _task_problems(self) -> list[str]:
        if self.task == "retrieve":
            return [] if self.length is None else ["--length: goes with --task rerank; give --passage-length"]
        problems = [
            f"--{field.name.replace('_', '-')}: goes with --task retrieve"
            for field in fields(self)
            if field.name in _OF_VECTORS and getattr(self, field.name) != field.default
        ]
        if self.passage_length is not None:
            problems.append("--passage-length: a reranker reads query and passage together; give --length")
        problems += pair_length_problems(self.query_length, self.length)
        if not self.negatives:
            problems.append("--negatives: a reranker is trained against hard negatives; ask for some")
        return problems

    def _set_problems(self) -> list[str]:
        sets = len(set(self.train))
        problems = [
            f"--{side}-prompts: one for all or one for each of the {sets} paths of --train, got {len(prompts)}"
            for side, prompts in (("query", self.query_prompts), ("passage", self.passage_prompts))
            if len(prompts) not in (0, 1, sets)
        ]
        if self.queries is not None and not self.corpus:
            problems.append("--queries: names queries by id, which needs --corpus for the passages")
        several = max(len(self.query_prompts), len(self.passage_prompts)) > 1
        if several and self.dev and len(self.dev) != sets:
            problems.append(
                f"--dev: with prompts of their own for {sets} sets, give a path for each, in the order of --train"
            )
        if self.patience and not self.dev:
            problems.append("--patience: needs --dev, to tell a better step from a worse one")
        return [*problems, *self._only_with(bool(self.dev), "--dev", "dev_split", "dev_queries", "dev_passages")]

    def _loss_problems(self) -> list[str]:
        dims, weights, problems = self.matryoshka_dims, self.matryoshka_weights, []
        if any(dim < 1 for dim in dims) or len(set(dims)) < len(dims):
            problems.append(f"--matryoshka-dims: must be different numbers of 1 or more, got {_listed(dims)}")
        if weights and len(weights) != len(dims):
            problems.append(f"--matryoshka-weights: {len(weights)} of them for the {len(dims)} --matryoshka-dims")
        if any(not 0 < weight < math.inf for weight in weights):
            problems.append(f"--matryoshka-weights: must be above 0, got {_listed(weights)}")
        if self.distill == "none" and not self.contrast_weight:
            problems.append("--contrast-weight: nothing is left to train on; choose --distill, too")
        if self.distill != "none" and not self.negatives:
            problems.append("--negatives: --distill compares a positive with negatives; ask for some")
        if self.distill != "none" and not self.distill_weight:
            problems.append("--distill-weight: 0 learns nothing from the teacher; leave out --distill")
        return [
            *problems,
            *self._only_with(self.distill != "none", "--distill", "distill_weight"),
            *self._only_with(self.distill == "kl", "--distill kl", "teacher_temperature"),
            *self._only_with(self.contrast_weight > 0, "--contrast-weight above 0", "margin", "relative_margin"),
        ]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))
