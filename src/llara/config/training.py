"""The configurations of the training stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llara.config.base import ModelConfig


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
            *self._at_least(0, "epochs", "learning_rate", "weight_decay", "max_grad_norm", "lora_rank", "seed"),
            *self._within(0, 1, "warmup", "lora_dropout"),
        ]


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
    targets: Literal["unique", "all", "no-stopwords", "idf"] = "unique"
    """unique: the set of tokens of the target text; all: every token, repeats counted; no-stopwords: the set without
    stop words and punctuation; idf: the set, each token weighted by how few documents of the corpus hold it."""
    language: str = "english"
    """Language of the stop words of --targets no-stopwords."""
    loss_scale: float | None = None
    """Factor on the EBAE and EBAR losses; default: the template's (paper 1, release 0.1)."""
    lm_weight: float = 0.0
    """Weight of an added language-model loss on the text."""

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
        ]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Stage 2: contrastive learning on queries, relevant passages and hard negatives."""

    train: tuple[Path, ...]
    """JSON lines with query, pos, neg; or a collection with judgements (BEIR folder, pairs file, SQuAD JSON).
    A path given several times counts several times."""
    split: str = "train"
    """Split of the collections given as --train. Of a BEIR folder without dev.tsv, a fifth of the queries of `train` is
    held back as `dev`; `train-all` takes all of them. SQuAD JSON has only `test`."""
    negatives: int = 7
    """Hard negatives per query, drawn anew each epoch; queries that have fewer use what they have."""
    temperature: float = 0.01
    """Scores are divided by this before the softmax."""
    query_length: int | None = None
    """Tokens of a query, prompt included; default: what the model folder says, else 64."""
    passage_length: int | None = None
    """Tokens of a passage, prompt included; default: what the model folder says, else 160."""
    titles: bool = True
    """Put the title in front of a passage, here and, through the model folder, everywhere after."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [
            *super().problems(),
            *([] if self.train else ["--train: is required"]),
            *self._at_least(0, "negatives"),
            *self._at_least(1, "query_length", "passage_length"),
            *([] if self.temperature > 0 else [f"--temperature: must be above 0, got {self.temperature}"]),
        ]
