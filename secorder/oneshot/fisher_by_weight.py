"""A Fisher of second order by the heaviest columns of each sample, and draws of the rest."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .._torch.memory import unmetered
from ..layers.selection import Layer
from ..monitor.progress import progress_bar
from ..results import LayerInfo, Strategy
from .fisher_by_samples import without_rules
from .fisher_pairs import Found
from .heaviest import Forecast, by_weight, forecast
from .hessian.budget import Budget
from .hessian.estimate import Estimate
from .hessian.output_draws import Reduce, reduced, whole
from .measurement import Measurement
from .recorded_layer import RecordedLayer, contract_pairs
from .roots import Columns, First, Root


@dataclass
class ByWeight:
    """A Fisher by its heaviest columns, and draws of the rest."""

    budget: Budget  #: how exact
    reduce: Reduce = whole  #: of stacked diagonals by parameter, what is wanted; linear in them
    estimates: dict[str, Estimate] = field(default_factory=dict)  #: by layer, as they turned out
    forecast: bool = False  #: find out what it takes, and no more
    told: Forecast = field(default_factory=Forecast)  #: what it takes, for all layers together

    def some(self, pairs: Columns) -> Columns:
        """One column, which finds out where samples are."""
        return First(pairs, min(1, pairs.num_columns))


def heaviest_columns(
    task: Measurement,
    model_outputs: Sequence[Tensor],
    root: Root,
    served: Sequence[RecordedLayer],
    rest: Sequence[Layer],
    weighted: ByWeight,
    *,
    by_graph: bool,
) -> Found:
    """Of layers whose calls are settled (``served``), and of the rest.

    ``by_graph``: no hook of the model's changes gradients, so that operations may be followed through the graph.
    """
    layers = [z.layer for z in served] + list(rest)
    if not layers:
        return {}
    strategies = dict.fromkeys((z.layer.name for z in served), Strategy.RULE)

    def contract(columns: Columns) -> list[list[Tensor]]:
        found = contract_pairs(task, model_outputs, served, columns, alpha=1 / task.num_samples)
        values = {z.layer.name: parts or [] for z, parts in zip(served, found, strict=True)}
        for name, (parts, info) in without_rules(task, rest, columns, by_graph=by_graph).items():
            values[name], strategies[name] = parts, info.strategy
        return [reduced(weighted.reduce, values[x.name]) for x in layers]

    if weighted.forecast:
        with unmetered():
            weighted.told = forecast(root, weighted.budget, contract, task.generator)
        return {layer.name: ([], LayerInfo(strategies[layer.name])) for layer in layers}
    with progress_bar(task.progress, "Fisher by weight", root.num_columns, unit="columns") as advance:
        estimates = by_weight(root, weighted.budget, contract, task.generator, advance)
    weighted.estimates |= {layer.name: e for layer, e in zip(layers, estimates, strict=True)}
    return {
        layer.name: (
            e.values,
            LayerInfo(
                strategies[layer.name], 0, {"own_use": layer not in rest}, e.num_draws, e.relative_error, e.converged
            ),
        )
        for layer, e in zip(layers, estimates, strict=True)
    }
