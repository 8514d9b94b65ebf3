"""What every training job begins with: its processes, its model, and whether it was done before."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from llara.config import TrainConfig
from llara.model import EmbeddingModel
from llara.outputs import check_place
from llara.reranker import Reranker
from llara.training.arguments import precision
from llara.training.integrations import check_integrations
from llara.training.parallel import Ranks, join
from llara.training.workspace import TrainResult, finished, identity_of

Model = TypeVar("Model", EmbeddingModel, Reranker)


class Opening(NamedTuple, Generic[Model]):
    """A job that is about to begin.

    identity: what decides the trained weights. earlier: the result, where the same job was done before.
    """

    ranks: Ranks
    model: Model
    identity: dict[str, Any]
    earlier: TrainResult | None


def open_run(
    config: TrainConfig, stage: str, load: Callable[[], Model], data: Callable[[], Mapping[str, str]]
) -> Opening[Model]:
    """Joins the processes of the run, seeds them, loads the model, and looks for what an earlier run has left.

    Args:
        config: The job's configuration.
        stage: What the job is called in its record.
        load: Opens the model, with the contract that it is to be saved with; refuses what cannot be trained as asked.
        data: Gives a fingerprint of everything that is read, by name; asked of the first process alone.

    Raises:
        ConfigError: An integration that is not installed, or a device that several processes cannot share.
        StorageError: The output holds something else, or cannot be made.
    """
    check_integrations(config)
    check_place(config.output)
    ranks = join(config)
    torch.manual_seed(config.seed)
    model = load()

    def identify() -> dict[str, Any]:
        precise = precision(config, next(model.lm.parameters()))
        return identity_of(config, stage, model.fingerprint, model.contract, data(), precise, ranks.world)

    identity = ranks.ask(identify)
    return Opening(ranks, model, identity, ranks.ask(lambda: finished(config, identity)))
