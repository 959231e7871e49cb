"""A Fisher of second order by its heaviest columns, and random draws of the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..layers.selection import Layer
from ..monitor.progress import progress_bar
from ..results import LayerInfo, Strategy
from .fisher_by_samples import by_samples
from .fisher_pairs import Found
from .heaviest import by_weight
from .hessian.budget import Budget
from .hessian.estimate import relative_error
from .measurement import Measurement
from .output_hessian import expose_output
from .recorded_layer import RecordedLayer, contract_settled, require_linear_backward
from .roots import Columns, Root

__all__ = ["ByWeight", "heaviest_columns"]


@dataclass
class ByWeight:
    """A Fisher by its heaviest columns, and draws of the rest.

    Attributes:
        budget: how exact.
        errors: by layer, the standard errors by parameter of what was drawn, as it turned out.
    """

    budget: Budget
    errors: dict[str, list[Tensor]] = field(default_factory=dict)


def heaviest_columns(
    task: Measurement,
    model_outputs: Sequence[Tensor],
    root: Root,
    served: Sequence[RecordedLayer],
    rest: Sequence[Layer],
    weighted: ByWeight,
) -> Found:
    """The heaviest columns, and draws of the others.

    Args:
        task: the measurement.
        model_outputs: output tensors, samples in dim 0.
        root: of the columns.
        served: layers of which it is settled where samples are.
        rest: layers that are measured sample by sample.
        weighted: how exact; receives the errors.
    """
    layers = [z.layer for z in served] + list(rest)
    if not layers:
        return {}
    if rest and not task.certain:
        outputs: list[Tensor] = []
        expose_output(task.isolated.forward(task.inputs), outputs, task.dimension, detach=False)
        replacements = [s for layer in rest for s in task.isolated.replacements(layer)]
        require_linear_backward(outputs, replacements, root, task.generator)

    def contract(columns: Columns) -> list[Tensor]:
        found = contract_settled(model_outputs, served, columns, chunk_size=task.chunk_size)
        values = [v.detach().flatten() for parts in found if parts is not None for v in parts]
        if rest:
            by_sample = by_samples(task, rest, columns, linear=False)
            values += [v.detach() for layer in rest for v in by_sample[layer.name][0]]
        return values

    with progress_bar(task.progress, "Fisher by weight", root.num_columns, unit="columns") as advance:
        estimate = by_weight(root, weighted.budget, contract, task.generator, advance)
    result: Found = {}
    values, errors = iter(estimate.values), iter(estimate.errors)
    for layer in layers:
        own = [next(values) for _ in layer.parameters]
        mine = [next(errors) for _ in layer.parameters] if estimate.errors else []
        if mine:
            weighted.errors[layer.name] = mine
        error = relative_error(own, mine) if mine else 0.0
        strategy = Strategy.PER_SAMPLE if layer in rest else Strategy.RULE
        told = estimate.num_draws, error, estimate.converged
        result[layer.name] = own, LayerInfo(strategy, 0, {"own_use": layer not in rest}, *told)
    return result
