"""What runs a loaded model: torch in the type of its weights, torch with 8-bit linear maps, or OpenVINO.

Whichever it is, the vectors of a few texts are compared with those of torch before any is handed out.
"""

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from llara.config import ModelConfig
from llara.errors import MissingExtra, ModelError
from llara.int8 import quantize_linears
from llara.model import DTYPE_TOLERANCE, PROBE_TEXTS, SIDES, EmbeddingModel
from llara.pooling import real_tokens

# Rows and columns of the batch that a graph is drawn from, which then takes any number of both: more than one of each,
# for the tracer takes a one for a constant.
EXAMPLE = (3, 40)
MOST_ROWS = 1 << 16
UNLIMITED = 1 << 20  # columns of a graph whose model names no limit


def use_backend(model: EmbeddingModel, config: ModelConfig) -> None:
    """Makes a model run as its configuration says, in place.

    Raises:
        MissingExtra: OpenVINO is not installed.
        ModelError: It cannot run the model, or gives vectors that are not near enough.
    """
    if config.backend == "torch" and config.dtype != "int8":
        return
    expected = _vectors(model)
    if config.backend == "openvino":
        model.runner, model.dtype = _openvino(model, config.dtype), config.dtype.replace("auto", "float32")
        what = f"OpenVINO in {model.dtype}"
    else:
        quantize_linears(model.lm, model.name, keep=model.lm.get_output_embeddings())
        model.dtype = what = "int8"
    apart, allowed = float((_vectors(model) - expected).abs().max()), DTYPE_TOLERANCE[model.dtype]
    if not apart <= allowed:  # also catches NaN
        raise ModelError(
            f"{model.name}: {what} gives other vectors than torch: {apart:.2g} apart, allowed {allowed:.2g}; "
            "leave --backend and --dtype at their defaults for this model"
        )


def _vectors(model: EmbeddingModel) -> Tensor:
    """Returns the vectors of the probe's texts and of one that fills a passage, float32 [n, D]."""
    # The three have more than thirty tokens, whatever the tokenizer.
    long = " ".join(PROBE_TEXTS * (model.contract.passage_length // 30 + 1))
    return torch.cat([model.encode([*PROBE_TEXTS, long], side) for side in SIDES])


class _Trunk(torch.nn.Module):
    """The part of a model that OpenVINO runs: token ids int64 [B, W], and an encoder's mask, to states [B, W, D]."""

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.lm = model.lm  # its parameters must be found below this module
        self._trunk = model.trunk

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._trunk(input_ids=ids, attention_mask=mask)


def _openvino(model: EmbeddingModel, dtype: str) -> Any:
    """Returns what gives the states of a batch on OpenVINO's CPU plugin, as `EmbeddingModel.states` does."""
    if importlib.util.find_spec("openvino") is None:
        raise MissingExtra("--backend openvino", "openvino")
    import openvino

    names = {"float32": "f32", "auto": "f32", "bfloat16": "bf16"}
    settings = {
        "INFERENCE_PRECISION_HINT": names[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Else a process on a machine with several sockets would run on one of them.
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        with warnings.catch_warnings(action="ignore"):  # theirs, about what their own developers are to change
            graph = openvino.convert_model(_exported(model))
        request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
    except Exception as error:  # torch.export and OpenVINO raise whatever a model's code makes them
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{model.name}: OpenVINO cannot run this model ({first}); use --backend torch") from error

    def states(ids: Tensor, lengths: Tensor) -> Tensor:
        inputs = [ids] if model.contract.causal else [ids, real_tokens(lengths, ids.shape[1]).long()]
        # The output is a copy: the request's own is overwritten by the next batch.
        return torch.from_numpy(request.infer([each.numpy() for each in inputs], share_inputs=True)[0])

    return states


def _exported(model: EmbeddingModel) -> Any:
    """Returns the trunk as a graph that takes any number of rows and columns."""
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    columns = torch.export.Dim("columns", min=2, max=model.positions or UNLIMITED)
    example: tuple[Tensor, ...] = (torch.zeros(EXAMPLE, dtype=torch.long),)
    if not model.contract.causal:
        example += (torch.ones(EXAMPLE, dtype=torch.long),)
    shapes = tuple({0: rows, 1: columns} for _ in example)
    with torch.no_grad():
        return torch.export.export(_Trunk(model).eval(), example, dynamic_shapes=shapes, strict=False)
