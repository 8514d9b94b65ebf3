"""Tiny random encoders and their tokenizers: BERT, and what differs from it in positions and special tokens."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, T5EncoderModel

from llara.contract import Contract
from llara.model import PROJECTION, EmbeddingModel
from llara.templates import E5, Template
from tests import tiny

# Learned positions; those that begin behind the padding's; no token types; rotary and local attention; relative ones.
FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "t5")
POSITIONS, WINDOW = 128, 8
BERT_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}
T5_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>"}


def tokenizer(family: str = "bert") -> PreTrainedTokenizerFast:
    """A real tokenizer over `tiny.TEXT` that adds the special tokens of a family by itself."""
    names = {"roberta": ROBERTA_TOKENS, "t5": T5_TOKENS}.get(family, BERT_TOKENS)
    special = list(dict.fromkeys(names.values()))
    if "[CLS]" in special:
        core = Tokenizer(WordPiece(unk_token="[UNK]"))
        core.normalizer, core.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
        trainer: Any = WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    else:
        core = Tokenizer(BPE())
        core.pre_tokenizer = ByteLevel(add_prefix_space=False)
        alphabet = ByteLevel.alphabet()
        trainer = BpeTrainer(
            vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
        )
    core.train_from_iterator(tiny.TEXT, trainer)
    start, end = names.get("cls_token", ""), names.get("sep_token", names.get("eos_token"))
    core.post_processor = TemplateProcessing(
        single=f"{start} $A {end}".strip(),
        special_tokens=[(name, core.token_to_id(name)) for name in special],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def config(family: str, words: PreTrainedTokenizerFast, **changes: Any) -> Any:
    """The configuration of a tiny encoder; `changes` are fields of the family's own configuration."""
    values: dict[str, Any] = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    if family == "distilbert":
        values |= {"dim": tiny.HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    elif family == "t5":
        values |= {"d_model": tiny.HIDDEN, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8}
    else:
        values |= {
            "hidden_size": tiny.HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
    if family != "t5":
        values |= {"max_position_embeddings": POSITIONS}
    if family == "modernbert":
        values |= {"local_attention": WINDOW, "global_attn_every_n_layers": 2}
        values |= {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("cls", "sep")}
        values |= {"bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id}
    return AutoConfig.for_model(family, **(values | changes))


def encoder(
    family: str = "bert", words: PreTrainedTokenizerFast | None = None, *, seed: int = 0, **changes: Any
) -> Any:
    """A random encoder in float32 and evaluation mode, with weights large enough to matter."""
    settings = config(family, words or tokenizer(family), **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = T5EncoderModel(settings) if family == "t5" else AutoModel.from_config(settings)
        with torch.no_grad():
            for weight in lm.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.25)
    return lm.float().eval()


def model(family: str = "bert", template: Template = E5, *, dim: int | None = None, **changes: Any) -> EmbeddingModel:
    """A tiny encoder with its tokenizer and contract, not yet on disk; `dim` gives it a projection to so many."""
    words = tokenizer(family)
    lm = encoder(family, words, **changes)
    if hasattr(lm, "pooler"):
        lm.pooler = None
    if dim is not None:
        setattr(lm, PROJECTION, torch.nn.Linear(tiny.HIDDEN, dim, bias=False))
    return EmbeddingModel(lm, words, Contract(passage_length=100).with_template(template), "tiny", f"tiny {family}")


def save_encoder(folder: Path, family: str = "bert", *, seed: int = 0, **changes: Any) -> Path:
    """Writes an encoder's folder as a hub holds them: config, safetensors, tokenizer, nothing about pooling."""
    words = tokenizer(family)
    encoder(family, words, seed=seed, **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def add_modules(
    folder: Path,
    pooling: dict[str, Any],
    *,
    normalise: bool = True,
    prompts: dict[str, str] | None = None,
    dense: dict[str, torch.Tensor] | None = None,
    activation: str = "torch.nn.modules.linear.Identity",
) -> Path:
    """Adds what sentence-transformers writes beside a model."""
    steps = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalise else [])]
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(steps)
    ]
    write(folder / "modules.json", listed)
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": tiny.HIDDEN, **pooling})
    if dense:
        write(folder / "2_Dense" / "config.json", {"bias": "linear.bias" in dense, "activation_function": activation})
        save_file(dense, folder / "2_Dense" / "model.safetensors")
    if prompts is not None:
        write(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    return folder


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
