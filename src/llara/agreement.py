"""What a model folder says of itself against what the user asks for: the template and the contract that come of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llara.config import ModelConfig
from llara.contract import FILE_NAME, Contract
from llara.errors import ConfigError
from llara.kinds import check_template, is_encoder
from llara.published import Published, read_published
from llara.templates import PAPER, Template, load_template


def agree_on_template(
    saved: Contract | None, config: ModelConfig, folder: Path, usual: Template | None
) -> tuple[Template, Published | None]:
    """Returns the template, and what the files of sentence-transformers in the folder say where it is an encoder's.

    The user's word comes first, then the contract that the model was saved with, then those files, then `usual` where
    it is for this kind of model, then `paper`.

    Raises:
        ConfigError: It is for another kind of model than the folder holds.
        ModelError: An encoder, and nobody says how its vectors are read.
    """
    asked = load_template(config.template) if config.template else None
    encoder = is_encoder(folder) if saved is None else not saved.causal
    own = read_published(folder) if saved is None and (encoder or (asked and asked.encoder)) else None
    fitting = usual if usual is not None and usual.encoder == encoder else None
    template = asked or (saved.template if saved else None) or (own.template if own else None) or fitting or PAPER
    check_template(folder, template, encoder=encoder, stated=asked is not None, own=own)
    return template, own


def agree_on_contract(
    saved: Contract | None, config: ModelConfig, tokenizer: Any, template: Template, *, new_template: bool
) -> Contract:
    """Joins what the folder says with what the configuration asks for.

    Raises:
        ConfigError: They contradict each other, and the job may not give the model another template or BOS setting; or
            BOS is asked for, or forbidden, where the tokenizer's own special tokens stand around a text.
    """
    if template.encoder and config.bos != "auto":
        raise ConfigError("--bos: an encoder's text stands between its tokenizer's own special tokens; leave it out")
    if saved is None:
        bos = adds_bos(tokenizer) if config.bos == "auto" else config.bos == "yes"
        return Contract(bos=bos).with_template(template)
    asked = saved if template == saved.template else saved.with_template(template)
    asked = asked if config.bos == "auto" else replace(asked, bos=config.bos == "yes")
    if asked != saved and not new_template:
        what = "--template" if asked.template != saved.template else "--bos"
        raise ConfigError(
            f"{what}: {config.model} was saved with template {saved.template.name!r} and BOS "
            f"{'yes' if saved.bos else 'no'}; leave the flag out, or adapt the model anew"
        )
    return asked


def adds_bos(tokenizer: Any) -> bool:
    """Returns whether the tokenizer puts BOS in front of a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def describe_contract(contract: Contract, own: Published | None) -> str:
    """Returns what a folder without a contract is used as."""
    template = contract.template
    if contract.causal:
        return f"no {FILE_NAME} in the folder; using template {template.name}, BOS {'yes' if contract.bos else 'no'}"
    said = f"no {FILE_NAME} in the folder; an encoder, using template {template.name}: {_reading(template)}"
    prompts = [f"{name} prompt {prompt!r}" for name, prompt in _prompts(template).items() if prompt]
    said += f", {', '.join(prompts) or 'no prompts'}"
    if own is None:
        return said
    if own.template == template:
        return f"{said}; so its own files say (sentence-transformers)"
    theirs = f"{own.pooling} pooling" if own.template is None else _reading(own.template)
    return said if theirs == _reading(template) else f"{said}; its own files say {theirs}"


def _reading(template: Template) -> str:
    return f"{template.pooling} pooling, {'normalised' if template.normalise else 'not normalised'}"


def _prompts(template: Template) -> dict[str, str]:
    return {"query": template.query.prefix, "passage": template.passage.prefix}
