"""Tiny random rerankers: a decoder's trunk with a head of one output."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from llara.contract import ADAPTER
from llara.pairs import PairContract
from llara.reranker import Reranker, quiet_peft
from tests import tiny


def classifier(family: str = "llama", vocab_size: int = 400, *, seed: int = 0, labels: int = 1, **changes: Any) -> Any:
    """A random model for sequence classification, in float32 and evaluation mode."""
    settings = tiny.config(family, vocab_size, num_labels=labels, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForSequenceClassification.from_config(settings)
        with torch.no_grad():
            for weight in lm.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.25)
    return lm.float().eval()


def reranker(family: str = "llama", *, seed: int = 0, **contract: Any) -> Reranker:
    """A tiny reranker, not yet on disk; `contract` are fields of its contract."""
    words = tiny.tokenizer()
    made = PairContract(**{"bos": True, "query_length": 20, "length": 60, **contract})
    return Reranker(classifier(family, len(words), seed=seed), words, made, "tiny", f"tiny {family} reranker")


def save_published(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Writes a reranker as a hub holds them: config, safetensors, tokenizer, no `llara.json`."""
    words: PreTrainedTokenizerFast = tiny.tokenizer()
    classifier(family, len(words), seed=seed, **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, *, seed: int = 1) -> Any:
    """Writes a PEFT adapter over a base model, head included, as RankLLaMA was published; returns the PEFT model.

    Its configuration names no modules that were saved beside the low-rank ones, though its weights hold the head.
    """
    lm = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj", "gate_proj"]
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, target_modules=modules)
    with quiet_peft(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(lm, settings)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    weight.normal_(0.0, 0.2)
        model.eval().save_pretrained(folder)
    path = folder / ADAPTER
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": None}))
    return model
