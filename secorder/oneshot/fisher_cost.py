"""What a Fisher will take, before it is paid: the checks are run, and no pair is pulled back."""

import torch
from torch import Tensor

from .._torch.pytree import tensors_in
from .._torch.vjp import gradients
from ..errors import DoubleBackwardError
from ..layers.layout import DIM_ZERO
from ..results import Strategy
from .fisher import losses_by_output, require_independent_samples
from .fisher_pairs import FisherType
from .hessian.choice import Choice
from .hessian.facts import Facts
from .measurement import Measurement
from .recorded_layer import RecordedLayer, settle_layouts
from .recording import recorded

__all__ = ["fisher_choices"]


def fisher_choices(task: Measurement, fisher_type: FisherType, num_draws: int) -> dict[str, tuple[Facts, Choice]]:
    """The facts about each layer, and how its Fisher will be come by.

    Args:
        task: the measurement.
        fisher_type: which Fisher.
        num_draws: draws of ``"mc"``.
    """
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        output, loss = task.loss()
        recording.close()
        outputs = [t for t in tensors_in(output) if t.requires_grad]
        unusable = recording.unusable()
        layers = [
            RecordedLayer(x, recording.inputs[x.name], recording.leaves[x.name])
            for x in task.ruled
            if recording.leaves.get(x.name) and x.name not in unusable
        ]
        ruled = _by_rules(task, output, loss, layers)
    size = sum(t.numel() for t in outputs) // task.num_samples
    pairs = {"empirical": 1, "type-2": max(size, 1), "mc": num_draws}[fisher_type]

    def choice(name: str) -> Choice:
        if ruled is None:
            return Choice(Strategy.LOOP, task.num_samples * pairs, task.num_samples * pairs)
        if name in ruled:
            return Choice(Strategy.RULE, pairs, pairs)
        return Choice(Strategy.PER_SAMPLE, task.num_samples * pairs, task.num_samples * pairs)

    def facts(name: str, numel: int) -> Facts:
        z = sum(leaf.numel() for leaf in recording.leaves.get(name, []))
        passed = sum(t.numel() for t in outputs)
        return Facts(
            name,
            numel,
            outputs=z // task.num_samples,
            passed=passed,
            output_elements=max(z, passed),
            parameter_elements=numel + 4 * passed,
        )

    sizes = {x.name: sum(p.numel() for p in x.parameters.values()) for x in task.layers}
    return {name: (facts(name, numel), choice(name)) for name, numel in sizes.items()}


def _by_rules(task: Measurement, output: object, loss: Tensor, layers: list[RecordedLayer]) -> set[str] | None:
    """The layers that go by rules; None where the loss does not go by the output."""
    try:
        side = losses_by_output(task, output, loss, layers, second_order=False) if loss.requires_grad else None
    except DoubleBackwardError:
        side = None
    if side is None:
        return None
    require_independent_samples(task, output)
    ends = side.model_outputs
    replacements = [s for z in layers for s in task.isolated.replacements(z.layer)]
    reached = gradients(ends, replacements, [torch.ones_like(f) for f in ends])
    used = {id(s) for s, r in zip(replacements, reached, strict=True) if r is not None}
    alone = [z for z in layers if not any(id(s) in used for s in task.isolated.replacements(z.layer))]
    if task.certain:
        for z in alone:
            z.layouts = [DIM_ZERO] * len(z.leaves)
    elif alone:
        size = sum(f[0].numel() for f in ends)
        settle_layouts(ends, alone, task.random((1, task.num_samples, size), ends[0]), task.generator)
    return {z.layer.name for z in alone if z.layouts}
