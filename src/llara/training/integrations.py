"""The logging integrations of transformers that a run may report to."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from llara.config import TrainConfig
from llara.errors import ConfigError, nearest

INTEGRATIONS = ("tensorboard", "wandb", "trackio")
REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # with either, trackio logs to another machine
MODE = "WANDB_MODE"


def check_integrations(config: TrainConfig) -> None:
    """Refuses a logging integration that is unknown, not installed, or bound to the network of an offline job.

    Raises:
        ConfigError: Names all of them, and what to do.
    """
    problems = []
    for name in config.report_to:
        if name not in INTEGRATIONS:
            known = ", ".join(INTEGRATIONS)
            problems.append(f"--report-to: {name!r} is not one of {known}{nearest(name, INTEGRATIONS)}")
        elif importlib.util.find_spec(name) is None:
            problems.append(f"--report-to: {name} is not installed; install it with: pip install {name}")
    if config.offline and "trackio" in config.report_to:
        problems += [
            f"--report-to: {each} has trackio use the network; unset it" for each in REMOTE if each in os.environ
        ]
    if problems:
        raise ConfigError(problems)


@contextmanager
def off_network(config: TrainConfig) -> Iterator[None]:
    """Has Weights & Biases write the run of an offline job into a folder, for `wandb sync` to send."""
    before = os.environ.get(MODE)
    if config.offline and before != "disabled":
        os.environ[MODE] = "offline"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(MODE, None)
        else:
            os.environ[MODE] = before
