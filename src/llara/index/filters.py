"""Filters: which documents of an index a search may return, told from their metadata."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from llara import progress
from llara.conditions import Condition, kind_of, values_of
from llara.encoding.documents import DocumentStore
from llara.errors import ConfigError, StorageError, nearest
from llara.index.base import Allowed, Ids

BLOCK = 1 << 16  # documents between two steps; a multiple of 8, so that each block fills whole bytes
KNOWN = 1000  # names of fields that are remembered, to say which there are
SHOWN = 12  # of them that a message lists


@dataclass
class _Seen:
    """What a condition met on its way through the documents: how many have the field, and with what in it."""

    condition: Condition
    documents: int = 0
    comparable: int = 0
    kinds: dict[str, None] = field(default_factory=dict)

    def test(self, metadata: Any) -> bool:
        found = values_of(metadata, self.condition.field)
        if not found:
            return False
        self.documents += 1
        fits = self.condition.comparable(found)
        self.comparable += bool(fits)
        if not fits:
            self.kinds.setdefault(kind_of(found[0]))
        return self.condition.holds(fits)


class Answer(NamedTuple):
    """Which documents fit a filter, and notes on what it passed over."""

    allowed: Allowed
    notes: tuple[str, ...]


def find_allowed(
    conditions: Sequence[Condition], store: DocumentStore, ids: Ids, live: Allowed | None = None
) -> Answer:
    """Tells which documents fit all conditions; reads each document once, in memory that holds one bit for each.

    Args:
        conditions: See `llara.conditions`.
        store: The documents that the index was built from, in the same order; there may be more of them since.
        ids: Those of the index.
        live: Those that were not deleted; all where it is None. What was deleted fits nothing, and counts nowhere.

    Raises:
        ConfigError: No document has a field of a condition, or a value of its type there.
        StorageError: The store is damaged, or holds other documents than the index.
    """
    seen = [_Seen(condition) for condition in conditions]
    names: dict[str, None] = {}
    fits = _fits(seen, names, store, ids, live)
    bits = [np.empty(0, np.uint8)]
    with progress.Progress("filter", len(ids), "documents") as shown:
        while len(block := np.fromiter(islice(fits, BLOCK), np.bool_)):
            bits.append(np.packbits(block, bitorder="little"))
            shown.advance(len(block))
    problems = [problem for each in seen for problem in _problems(each, list(names))]
    if problems:
        raise ConfigError(problems)
    notes = tuple(note for each in seen for note in _notes(each))
    return Answer(Allowed(np.concatenate(bits), len(ids)), notes)


def _fits(
    seen: Sequence[_Seen], names: dict[str, None], store: DocumentStore, ids: Ids, live: Allowed | None
) -> Iterator[bool]:
    """Yields for each document of the index whether it fits; collects the names of fields."""
    if len(store) < len(ids):
        raise _strange(store, f"{len(store):,} documents there, {len(ids):,} in the index")
    alive = np.ones(BLOCK, np.bool_)
    for position, document in enumerate(islice(store.iter_documents(), len(ids))):
        if live is not None and not position % BLOCK:
            alive = live.mask(position, min(position + BLOCK, len(ids)))
        if ids[position] != document.id:
            raise _strange(store, f"document {position} is {document.id!r} there, {ids[position]!r} in the index")
        if not alive[position % BLOCK]:
            yield False
            continue
        if len(names) < KNOWN:
            names.update(dict.fromkeys(document.metadata))
        # Each condition looks at every document, so that what it met does not depend on the others.
        tests = [each.test(document.metadata) for each in seen]
        yield all(tests)


def _strange(store: DocumentStore, what: str) -> StorageError:
    advice = "a filter reads the documents that the index was built from: build it anew from this folder"
    return StorageError(store.folder, f"holds other documents than the index ({what}); {advice}")


def _problems(seen: _Seen, names: list[str]) -> Iterator[str]:
    condition, where = seen.condition, f"--filter: {seen.condition.text!r}"
    if not seen.documents:
        there = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        known = f"there are {there}" if names else "the documents have no metadata at all"
        yield f"{where}: no document has a field {condition.field!r}{nearest(condition.field, names)}; {known}"
    elif not seen.comparable:
        wanted, held = " or ".join(condition.kinds), " or ".join(seen.kinds)
        advice = "; between double quotes a value is a text" if "text" in seen.kinds else ""
        yield f"{where}: compares with {wanted}, and {condition.field!r} holds {held} in every document{advice}"


def _notes(seen: _Seen) -> Iterator[str]:
    others = seen.documents - seen.comparable
    if others:
        what = f"{others:,} documents hold {' or '.join(seen.kinds)} there, which fits no condition on"
        yield f"--filter {seen.condition.text!r}: {what} {' or '.join(seen.condition.kinds)}"
