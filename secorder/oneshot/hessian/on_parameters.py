"""The loss's gradient in the parameters themselves, on a graph of its own."""

from collections.abc import Sequence

from torch import Tensor

from ..._torch.vjp import gradients
from ...layers.selection import Layer
from ..loss import require_dependence
from ..measurement import Measurement
from ..recording import seen


def on_parameters(task: Measurement, layers: Sequence[Layer]) -> list[tuple[Layer, list[Tensor | None]]]:
    """Each layer with the loss's gradient in its replacement parameters, all uses of them counted, differentiable."""
    if not layers:
        return []
    with seen(layers) as recording:
        _, loss = task.loss(second_order=True)
        replacements = [s for layer in layers for s in task.isolated.replacements(layer)]
        found = gradients(loss, replacements, create_graph=True)
        recording.require_seen(loss)
    if all(g is None for g in found):
        require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
    by_replacement = dict(zip((id(s) for s in replacements), found, strict=True))
    return [(layer, [by_replacement[id(s)] for s in task.isolated.replacements(layer)]) for layer in layers]
