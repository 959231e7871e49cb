"""One strategy run alone on a layer, past the choice."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.investigate import Findings, investigate
from secorder.oneshot.hessian.layer_graph import LayerGraph
from secorder.oneshot.hessian.run import on_parameters
from secorder.oneshot.measurement import Measurement
from secorder.oneshot.recording import recorded

from ...helpers import by_layer, measured
from ...reference import hessian_by_element


def exact(model: nn.Module, batch: tuple[Tensor, Tensor], layer: str) -> list[Tensor]:
    """The diagonal of a layer by brute force, by parameter."""
    return by_layer(model, hessian_by_element(model, F.cross_entropy, *batch), layer)


def in_z(run: Callable[[Measurement, Findings, LayerGraph], Any], model: nn.Module, batch: Any, layer: str) -> Any:
    """A strategy that goes by a layer's outputs."""

    def work(task: Measurement) -> Any:
        with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
            found = investigate(task, recording, Budget("exact"), columns=True, everything=True)
            return run(task, found, found.graphs[layer])

    return measured(work, model, batch)


def on_theta(run: Callable[..., Any], model: nn.Module, batch: Any, layer: str) -> Any:
    """A strategy that goes by a layer's parameters."""

    def work(task: Measurement) -> Any:
        (found,) = on_parameters(task, [x for x in task.layers if x.name == layer])
        return run(task, *found)

    return measured(work, model, batch)
