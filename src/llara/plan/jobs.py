"""The three plans as jobs. What is heavy is imported within them: how long that takes is part of what a job takes."""

import time

from llara.plan.config import PlanAdaptConfig, PlanEncodeConfig, PlanIndexConfig
from llara.plan.report import Estimate

LONGEST_START = 0.5  # seconds of Python and the command line; a process that has worked longer did something else


def plan_adapt(config: PlanAdaptConfig) -> Estimate:
    """Returns what `adapt` would take with these settings.

    Raises:
        DataError: A path is missing, or a row of the sample is one that `adapt` would stop at.
        ModelError: A model that cannot be loaded or adapted.
        ConfigError: Settings that contradict the model.
    """
    before, began = _start(), time.perf_counter()
    import llara.training.adapt  # noqa: F401

    started = before + time.perf_counter() - began
    from llara.plan.adapt import estimate

    return estimate(config, started)


def plan_encode(config: PlanEncodeConfig) -> Estimate:
    """Returns what `encode` would take with these settings.

    Raises:
        DataError: A path is missing, or no row of the sample is a document.
        ModelError: A model that cannot be loaded.
        ConfigError: Settings that contradict the model.
    """
    before, began = _start(), time.perf_counter()
    import llara.encoding.encode
    import llara.retriever  # noqa: F401

    started = before + time.perf_counter() - began
    from llara.plan.encode import estimate

    return estimate(config, started)


def plan_index(config: PlanIndexConfig) -> Estimate:
    """Returns what `index` would take with these settings.

    Raises:
        ConfigError: A language that has no stemmer.
        DataError: A path is missing, or no row of the sample is a document.
        ModelError: A model whose shape cannot be read.
        StorageError: The vectors folder is damaged.
    """
    before, began = _start(), time.perf_counter()
    import llara.index.build  # noqa: F401

    started = before + time.perf_counter() - began
    from llara.plan.index import estimate

    return estimate(config, started)


def _start() -> float:
    """Returns what it took to get here, in a process that was started for the plan."""
    return min(time.process_time(), LONGEST_START)
