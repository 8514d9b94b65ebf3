"""The job `explain`: which tokens the embeddings of some texts say, and which they share."""

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llara import contract as contracts
from llara.config import ExplainConfig
from llara.data import read_documents
from llara.data.docstrings import read_docstrings
from llara.errors import DataError, MissingExtra
from llara.explain.align import Slots, collect, first_component, measure
from llara.explain.records import ModelView, PairView, SaidTerm, SharedTerm, TextView
from llara.explain.result import Explanation
from llara.hub import resolve
from llara.lexical import TermOptions, TermReader, Terms
from llara.loading import load_model
from llara.model import EmbeddingModel
from llara.outputs import check_file_output, save_settings
from llara.progress import Progress, hushed, note
from llara.templates import SideName

# Text that is on every machine, in the words of which any model of English has seen many.
PACKAGES = ("asyncio", "email", "logging", "unittest")


@dataclass(frozen=True)
class _Texts:
    """Texts of a sample, and where they came from; `title` is empty where there is none."""

    pairs: list[tuple[str, str]]
    source: str


def explain(config: ExplainConfig) -> Explanation:
    """Reads the terms off the embeddings of queries and documents.

    A term's weight is `log(1 + max(0, logit))` of the LM head at the slots that the vector is read from; of a query it
    is the template's NEXT side that speaks, of a document SELF.

    Raises:
        ConfigError: Settings that do not fit, or a plot that is an input.
        ModelError: No such model, a reranker, or a model without a trained LM head.
        MissingExtra: A plot is asked for and matplotlib is not installed.
        DataError: A bad row in the sample, or no text.
        StorageError: The plot cannot be written.
    """
    if config.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingExtra("--plot", "report")
        check_file_output(config.plot, config.sample, flag="--plot")
    if config.compare is not None:  # a wrong name is to show before the first model is read
        resolve(config.compare, offline=config.offline, remote_code=config.trust_remote_code)
    sample = _read_sample(config)
    model = load_model(config)
    views = [_view(model, config, sample)]
    if config.compare is not None:
        contract = model.contract
        del model  # one at a time: the two may not fit together
        other = _open_compared(config, contract)
        views.insert(0, _view(other, config, sample))
    found = Explanation(tuple(views), config.show, tuple(_warnings(views, config)), config.plot)
    for warning in found.warnings:
        note(f"warning: {warning}")
    if config.plot is not None:
        from llara.explain.plot import write_plot

        write_plot(found, config.plot)
        save_settings(config.plot, config)
    return found


def _read_sample(config: ExplainConfig) -> _Texts:
    if config.sample:
        documents = itertools.islice(read_documents(config.sample), config.sample_size)
        source = ", ".join(map(str, config.sample))
        pairs = [(document.title, document.text) for document in documents]
        if len(pairs) < 2:
            raise DataError(source, None, f"{len(pairs)} document, and a sample takes two or more")
        return _Texts(pairs, source)
    rows = read_docstrings(PACKAGES)
    if len(rows) < 2:
        raise DataError("--sample", None, "Python's own packages have no sources here; name a corpus")
    step = max(len(rows) / config.sample_size, 1.0)  # spread over all of them: neighbours are of one module
    places = sorted({int(number * step) for number in range(min(config.sample_size, len(rows)))})
    return _Texts([("", rows[place].body) for place in places], "Python's documentation strings")


def _open_compared(config: ExplainConfig, contract: contracts.Contract) -> EmbeddingModel:
    """Opens the model to compare with; without a contract of its own it is used as the other one is."""
    assert config.compare is not None
    folder = resolve(config.compare, offline=config.offline, remote_code=config.trust_remote_code)
    if contracts.form_of(folder) is not None:
        return load_model(replace(config, model=config.compare))
    with hushed():  # it would speak of the template that such a folder gets by itself
        model = load_model(replace(config, model=config.compare, bos="yes" if contract.bos else "no"))
    model.contract = contract
    model.check_lengths()
    note(f"{config.compare}: no {contracts.FILE_NAME} in the folder; used with the contract of {config.model}")
    return model


# One model ---------------------------------------------------------------------------------------------------------


def _view(model: EmbeddingModel, config: ExplainConfig, sample: _Texts) -> ModelView:
    plain = TermReader(model, TermOptions(top_k=config.top_k, fold=config.fold))
    texts = [model.contract.join_title(title, text) for title, text in sample.pairs]
    sides: tuple[SideName, ...] = ("passage", "query") if config.remove_component and config.query else ("passage",)
    with Progress(f"sample of {model.name}", len(texts) * len(sides), "texts") as shown:
        slots = {side: collect(model, texts, side, config.token_budget, shown.advance) for side in sides}
    readers, removed = _readers(plain, slots, config)
    queries, query_terms, query_vectors = _say(readers["query"], config.query, "query", config)
    documents, document_terms, document_vectors = _say(readers["passage"], config.document, "passage", config)
    pairs = [
        _pair(readers["passage"], (number, query_terms.of(number)), (place, document_terms.of(place)), float(score))
        for number, row in enumerate(query_vectors @ document_vectors.T)
        for place, score in enumerate(row)
    ]
    alignment = measure(readers["passage"], slots["passage"], sample.source)
    return ModelView(model.name, queries, documents, tuple(pairs), alignment, removed)


def _readers(
    plain: TermReader, slots: dict[SideName, Slots], config: ExplainConfig
) -> tuple[dict[SideName, TermReader], dict[SideName, float]]:
    """Returns a reader per side, each without the component of its own side where that is asked for, and its share."""
    readers: dict[SideName, TermReader] = {"query": plain, "passage": plain}
    removed: dict[SideName, float] = {}
    if config.remove_component:
        for side, found in slots.items():
            direction, removed[side] = first_component(found.slots)
            readers[side] = plain.without(direction)
    return readers, removed


def _say(
    reader: TermReader, texts: Sequence[str], side: SideName, config: ExplainConfig
) -> tuple[tuple[TextView, ...], Terms, np.ndarray]:
    vectors, terms = reader.encode(texts, side, config.token_budget)
    template = reader.model.bind()
    rows = template.encode(texts, side, reader.model.contract.length(side))
    views = []
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        own = set(reader.own_terms(template.unwrap(row, side)))
        ids, weights = terms.of(number)
        said = tuple(
            SaidTerm(term_text(reader, token), weight, token in own)
            for token, weight in zip(ids.tolist(), weights.tolist(), strict=True)
        )
        views.append(TextView(side, text, len(own), sum(each.in_text for each in said), said))
    return tuple(views), terms, vectors.numpy()


def _pair(
    reader: TermReader,
    query: tuple[int, tuple[np.ndarray, np.ndarray]],
    document: tuple[int, tuple[np.ndarray, np.ndarray]],
    score: float,
) -> PairView:
    asked = dict(zip(*(each.tolist() for each in query[1]), strict=True))
    told = dict(zip(*(each.tolist() for each in document[1]), strict=True))
    products = {token: asked[token] * told[token] for token in asked if token in told}
    total = sum(products.values())
    order = sorted(products, key=lambda token: (-products[token], token))
    shared = tuple(
        SharedTerm(term_text(reader, token), asked[token], told[token], products[token], products[token] / total)
        for token in order
    )
    return PairView(query[0], document[0], score, total, shared)


def term_text(reader: TermReader, token: int) -> str:
    """Returns a term as it is shown: folded terms bare and lower, others with the blanks that they begin or end with.

    A token that holds only a part of a character is shown as the tokenizer's own name for it.
    """
    tokenizer = reader.model.tokenizer
    text: str = tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        return str(tokenizer.convert_ids_to_tokens(token))
    bare = text.strip()
    return bare.lower() if reader.options.fold and bare else text


def _warnings(views: Sequence[ModelView], config: ExplainConfig) -> Iterator[str]:
    for view in views:
        found = view.alignment
        if found.near_chance:
            yield (
                f"{view.model}: its embeddings name their own texts hardly better than other ones (recall "
                f"{found.recall:.3f}, chance {found.chance:.3f}), so what they say here tells little: it was not "
                "adapted, or was fine-tuned away from its LM head"
            )
        silent = sum(not text.terms for text in view.texts)
        if silent:
            yield (
                f"{view.model}: {silent} of {len(view.texts)} embeddings say nothing: the LM head puts every token "
                "below zero"
            )
    if not config.sample and config.remove_component:
        yield "the component was found on Python's documentation strings; give --sample with texts like your own"
