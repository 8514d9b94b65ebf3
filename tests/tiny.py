"""Tiny random models and real tokenizers, made on the spot: every shape of decoder in a few thousand weights."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llara.contract import Contract
from llara.model import EmbeddingModel

TEXT = (
    "The sky is blue because air scatters short wavelengths of light more than long ones.",
    "Why is the sky blue? The original sentence: The next sentence: query: passage:",
    "A tokenizer turns text into numbers, and a model turns numbers into vectors.",
    "Read a file line by line, and close the file when the last line is read.",
    '", summarize the above passage within eight words: ", predict the following passage within eight words: ',
)
FAMILIES = ("llama", "qwen3", "mistral", "gpt2", "gpt_neox")  # the shapes that most others resemble
# Every shape that the whole job is tried on: rotary, learned and ALiBi positions, tied and untied heads, heads with a
# bias, scaled embeddings and logits, soft caps, sliding windows, transposed and fused matrices, experts.
DECODERS = (
    *FAMILIES,
    *("qwen2", "opt", "phi", "phi3", "gemma2", "gemma3_text", "cohere", "granite", "bloom", "falcon", "gptj", "olmo2"),
    "mixtral",
)
HIDDEN, LAYERS, HEADS, POSITIONS = 32, 2, 4, 512
WINDOW = 12  # mistral's sliding window, shorter than most texts here


def tokenizer(
    *, bos: bool = True, eos: bool = True, pad: bool = True, adds_bos: bool = True, kind: str = "bytes"
) -> PreTrainedTokenizerFast:
    """A real tokenizer over `TEXT`, with the special tokens asked for, ids in a fixed order.

    Args:
        bos: Has `<s>`.
        eos: Has `</s>`.
        pad: Has `<pad>`.
        adds_bos: Puts `<s>` in front of a text by itself, as Llama's does; needs `bos`.
        kind: `bytes`, byte-level BPE that can write any text, or `words`, which knows the words of `TEXT` alone.
    """
    special = [*(["<s>"] if bos else []), *(["</s>"] if eos else []), *(["<pad>"] if pad else [])]
    if kind == "bytes":
        core = Tokenizer(BPE())
        core.pre_tokenizer = ByteLevel(add_prefix_space=False)
        core.decoder = ByteLevelDecoder()
        alphabet = ByteLevel.alphabet()
        trainer: Any = BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
        )
    else:
        core = Tokenizer(WordLevel(unk_token="<unk>"))
        core.pre_tokenizer = Whitespace()
        trainer = WordLevelTrainer(special_tokens=[*special, "<unk>"], show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    if bos and adds_bos:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    names |= {"pad_token": "<pad>" if pad else None, "unk_token": "<unk>" if kind == "words" else None}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{key: value for key, value in names.items() if value})


def config(family: str, vocab_size: int = 400, **changes: Any) -> Any:
    """The configuration of a tiny model; `changes` are fields of the family's own configuration."""
    values: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if family == "gpt2":
        values |= {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
        values |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    elif family == "gptj":
        values |= {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "rotary_dim": 4}
        values |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    elif family == "bloom":
        values |= {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
    elif family == "falcon":
        values |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        values |= {"max_position_embeddings": POSITIONS}
    elif family == "mpt":
        values |= {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS}
    else:
        values |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        values |= {"intermediate_size": 2 * HIDDEN, "max_position_embeddings": POSITIONS}
        if family != "gpt_neox":
            values |= {"num_key_value_heads": 2, "head_dim": HIDDEN // HEADS}
    if family == "mistral":
        values |= {"sliding_window": WINDOW}
    if family == "opt":
        values |= {"ffn_dim": 2 * HIDDEN}
    if family == "mixtral":
        values |= {"num_local_experts": 2}
    return AutoConfig.for_model(family, **{**values, **changes})


def language_model(
    family: str = "llama", vocab_size: int = 400, *, attention: str | None = None, seed: int = 0, **changes: Any
) -> Any:
    """A random causal language model in float32 and evaluation mode, with weights large enough to matter.

    `attention` None is what transformers picks: SDPA where the model has it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config(family, vocab_size, **changes), attn_implementation=attention)
        # Initialised at 0.02, attention would be near uniform and a wrong mask would hardly show.
        with torch.no_grad():
            for weight in lm.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.25)
            bias = getattr(lm.get_output_embeddings(), "bias", None)  # zero at first, and then its absence hardly shows
            if bias is not None:
                bias.normal_(0.0, 0.25)
    return lm.float().eval()


def model(
    family: str = "llama",
    *,
    contract: Contract | None = None,
    words: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    **changes: Any,
) -> EmbeddingModel:
    """A tiny model with its tokenizer and contract, not yet on disk; `changes` as in `language_model`."""
    words = words or tokenizer()
    lm = language_model(family, len(words), seed=seed, **changes)
    return EmbeddingModel(lm, words, contract or Contract(bos=words.bos_token_id is not None), "tiny", f"tiny {family}")


def save_base(
    folder: Path, family: str = "llama", *, words: PreTrainedTokenizerFast | None = None, seed: int = 0, **changes: Any
) -> Path:
    """Writes a base model folder, as a hub holds them: config, safetensors, tokenizer, no `llara.json`."""
    words = words or tokenizer()
    language_model(family, len(words), seed=seed, **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
