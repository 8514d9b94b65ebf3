"""What kind of model a folder holds, by its configuration alone: a decoder, an encoder, or a reranker."""

from pathlib import Path
from typing import Any

from llara import contract as contracts
from llara.errors import ConfigError, ModelError, StorageError
from llara.files import read_json
from llara.published import Published
from llara.templates import DECODERS, ENCODERS, Template

READING = f'--template {", ".join(each.name for each in ENCODERS)}, or a TOML file with pooling = "cls" or "mean"'


def settings_of(folder: Path) -> dict[str, Any]:
    """Returns a model's configuration; none where it cannot be read: whoever loads the folder says what is wrong."""
    try:
        settings = read_json(folder / "config.json")
    except StorageError:
        return {}
    return settings if isinstance(settings, dict) else {}


def kind_of(folder: Path) -> str:
    """Returns what transformers calls this kind of model, as the folder's configuration has it."""
    return str(settings_of(folder).get("model_type"))


def architectures(folder: Path) -> list[str]:
    """Returns the classes that a folder's configuration names; none where it cannot be read."""
    named = settings_of(folder).get("architectures")
    return [str(each) for each in named] if isinstance(named, list) else []


def is_published_reranker(folder: Path) -> bool:
    """Tells a reranker without `llara.json`: a model for sequence classification, or an adapter of one."""
    if contracts.is_adapter(folder):
        try:
            settings = read_json(folder / contracts.ADAPTER)
        except StorageError:  # whoever opens the adapter says what is wrong with it
            return False
        return isinstance(settings, dict) and settings.get("task_type") == "SEQ_CLS"
    kinds = architectures(folder)
    return bool(kinds) and all(kind.endswith("ForSequenceClassification") for kind in kinds)


def refuse_reranker(folder: Path) -> None:
    """Refuses a published reranker where a retriever belongs.

    Raises:
        ModelError: The folder's configuration is that of a model, or of an adapter, for sequence classification.
    """
    if is_published_reranker(folder):
        raise ModelError(
            f"{folder}: is {contracts.KINDS[contracts.RERANKER]}, and not {contracts.KINDS[contracts.FORMAT]}"
        )


def refuse_adapter(folder: Path) -> None:
    """Refuses a PEFT adapter where a whole model belongs, and says what it is for.

    Raises:
        ModelError: It is one: of a reranker as RankLLaMA was published, or of another model.
    """
    if contracts.is_adapter(folder):
        refuse_reranker(folder)
        raise ModelError(f"{folder}: is a PEFT adapter; merge it into its base model (merge_and_unload) first")


def is_encoder(folder: Path) -> bool:
    """Tells an encoder by its name; `parity` finds those of any other name.

    Raises:
        ModelError: It is the encoder of an encoder-decoder that transformers cannot open without the decoder.
    """
    from transformers.models.auto import modeling_auto

    kind, decodes = kind_of(folder), settings_of(folder).get("is_decoder")
    if _is_half(kind):
        return True
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes
    if encoder and kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{folder}: is an encoder with a decoder ({kind}); of these, llara takes the encoders of T5")
    return encoder


def _is_half(kind: str) -> bool:
    """Tells whether a model is an encoder with a decoder whose encoder can be opened alone (T5 and its like)."""
    from transformers.models.auto import modeling_auto

    whole, half = (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    )
    return kind in whole and kind in half


def class_of(folder: Path, *, encoder: bool) -> tuple[Any, str]:
    """Returns the class of transformers that opens a folder as what it is, and what that is called in errors."""
    import transformers

    if not encoder:
        return transformers.AutoModelForCausalLM, "a causal language model"
    half = _is_half(kind_of(folder))
    return transformers.AutoModelForTextEncoding if half else transformers.AutoModel, "an encoder"


def check_template(
    folder: Path, template: Template, *, encoder: bool, stated: bool, own: Published | None = None
) -> None:
    """Refuses a template that is for another kind of model.

    Args:
        folder: The model.
        template: How its vectors are to be read.
        encoder: Whether the folder holds an encoder, as far as its name tells.
        stated: Whether anybody asked for this template.
        own: What the folder's own files say of an encoder, where they do.

    Raises:
        ModelError: An encoder, and nobody said how its vectors are read.
        ConfigError: A template for decoders with an encoder, or one for encoders with a decoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = kind_of(folder)
    if encoder and not template.encoder:
        what = f"is an encoder ({kind}), whose positions see what stands after them"
        if stated:
            raise ConfigError(
                f"--template: {template.name!r} is for causal decoders, and {folder} {what}; use {READING}"
            )
        other = f"; its own files name {own.pooling} pooling, which llara does not do" if own else ""
        raise ModelError(
            f"{folder}: {what}{other}; to encode, search or fine-tune with it, say how its vectors are read: {READING} "
            "(adapt takes causal decoders alone)"
        )
    if template.encoder and not encoder and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = ", ".join(each.name for each in DECODERS)
        raise ConfigError(
            f"--template: {template.name!r} is for encoders, and {folder} is a causal decoder ({kind}); use {names}, "
            "or a TOML file with slots"
        )
