"""Where the files of a model are: in this package, in a folder here, or on a hub."""

from collections.abc import Sequence
from pathlib import Path

from llara import contract as contracts
from llara.errors import ModelError
from llara.files import TEMPORARY
from llara.kinds import refuse_adapter

MINI = Path(__file__).parent / "assets" / "mini"
OTHER_FOLDERS = "[!0-9]*/*"  # but for those of sentence-transformers, such as 1_Pooling: see `published.py`
PROJECTIONS = "*_Dense/*.safetensors"  # small, and what the size of a vector is known by
WEIGHTS = "*.safetensors"
DESCRIPTIONS = ("*.json", "*.model", "*.txt", "*.jinja")  # configuration and tokenizer

CONVERT = "pickled weights are not read; convert them, without running what a pickle may hold: llara convert --model {}"


def resolve(
    name: str,
    *,
    offline: bool = False,
    remote_code: bool = False,
    weights: bool = True,
    marks: Sequence[str] = ("config.json",),
) -> Path:
    """Returns the local folder of a model: `mini`, a folder, or a hub id (downloaded into the hub's cache).

    A hub id may name a revision: `organisation/name@revision`. Without `weights`, those of a hub id are not downloaded,
    and may be missing from what is returned. A folder here must hold one of the files in `marks`.
    """
    if name == "mini":
        return MINI
    folder = Path(name).expanduser()
    here = folder.is_dir()
    if not here:
        hub_id, revision = hub_name(name)
        patterns = [*([WEIGHTS] if weights else []), *DESCRIPTIONS, PROJECTIONS, *(["*.py"] if remote_code else [])]
        folder = download(hub_id, revision, patterns, offline=offline)
    elif folder.name.startswith(TEMPORARY):
        raise ModelError(f"{folder}: was left by a save that did not finish; delete it")
    if contracts.ADAPTER not in marks:
        refuse_adapter(folder)
    if here and not any((folder / mark).is_file() for mark in marks):
        raise ModelError(f"{folder}: holds no model ({' or '.join(marks)} is missing)")
    return folder


def hub_name(name: str) -> tuple[str, str]:
    """Returns the id and the revision ("" where none is named) of a model on the hub.

    Raises:
        ModelError: It has not the form organisation/name or organisation/name@revision.
    """
    hub_id, at, revision = name.partition("@")
    place = Path(name).expanduser()
    parts = hub_id.split("/")
    if place.is_absolute() or name.startswith((".", "~")) or len(parts) != 2 or not all(parts) or (at and not revision):
        raise ModelError(f"{name}: no such folder, and not a hub id of the form organisation/name")
    return hub_id, revision


def download(hub_id: str, revision: str, patterns: Sequence[str], *, offline: bool) -> Path:
    """Returns the folder in the hub's cache that holds a model's files; those that it lacks are fetched.

    Args:
        hub_id: organisation/name.
        revision: A branch, tag or commit; "" is the main branch.
        patterns: Which files.
        offline: Look into the cache only.

    Raises:
        ModelError: It is in neither; names the command that gets it.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision or None,
                allow_patterns=[*patterns],
                ignore_patterns=["consolidated*", OTHER_FOLDERS],
                local_files_only=offline,
            )
        )
    except Exception as error:  # the hub's client lets errors of its HTTP library through
        raise ModelError(
            f"{hub_id}: neither a folder here nor in the hub's cache ({constants.HF_HUB_CACHE}), and it could not be "
            f"fetched ({type(error).__name__}); get it with: hf download {hub_id}"
            f"{f' --revision {revision}' if revision else ''}"
        ) from error
