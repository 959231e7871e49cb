"""The Hessian diagonal of every layer, by the strategies that were chosen."""

from torch import Tensor

from ..._torch.differentiability import differentiable_zero
from ..._torch.vjp import gradients
from ...layers.dtypes import zeros
from ...results import Diagonals, LayerInfo
from ..measurement import Measurement
from ..recording import recorded
from . import output_basis, parameter_basis
from .budget import Budget
from .investigate import investigate
from .on_parameters import on_parameters
from .run import carry_out

__all__ = ["hessian_diagonal"]


def hessian_diagonal(task: Measurement, budget: Budget) -> Diagonals:
    """∂²L/∂θ_i² of ``L = loss_fn(model(inputs), targets)`` for every parameter of the layers.

    See :meth:`secorder.CurvatureProbe.hessian_diagonal`, which this function carries out.
    """
    if task.create_graph:
        return differentiable_hessian_diagonal(task)
    outcomes = carry_out(task, budget, lambda values: values)
    info = {
        name: LayerInfo(o.strategy, o.num_hvps, o.checks, e.num_draws, e.relative_error, e.converged)
        for name, o in outcomes.items()
        for e in (o.estimate,)
    }
    drawn = any(o.estimate.errors for o in outcomes.values())
    errors = {x.name: outcomes[x.name].estimate.errors or zeros(x) for x in task.layers} if drawn else None
    return Diagonals(task.layers, {name: o.estimate.values for name, o in outcomes.items()}, info, errors)


def differentiable_hessian_diagonal(task: Measurement) -> Diagonals:
    """The exact diagonal with a graph: strategies are found out, then run where the graph reaches the parameters."""
    budget = Budget("exact")
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        found = investigate(task, recording, budget, columns=False)
    chosen = found.chosen(budget)
    values: dict[str, list[Tensor]] = {x.name: zeros(x) for x in task.layers}
    in_z = [found.graphs[name] for name, choice in chosen.items() if choice.strategy == output_basis.NAME]
    with recorded(task.isolated, [graph.layer for graph in in_z], own_parameters=True) as recording:
        _, loss = task.loss(second_order=True)
        recording.close()
        for graph in in_z:
            name = graph.layer.name
            graph.inputs, graph.leaves = recording.inputs[name], recording.leaves[name]
            graph.with_graph = True
            graph.output_gradients = gradients(loss, graph.leaves, create_graph=True)
            values[name] = output_basis.run(task, graph, found.facts[name].output_elements, lambda _: None)
    rest = [x for x in task.layers if chosen[x.name].strategy == parameter_basis.NAME]
    for layer, own in on_parameters(task, rest):
        elements = found.facts[layer.name].parameter_elements
        if any(g is not None for g in own):
            values[layer.name] = parameter_basis.run(task, layer, own, elements, lambda _: None)
    # A diagonal that happens to be constant must still be differentiable: its gradient is zero, not an error.
    zero = differentiable_zero(task.model)
    info = {
        x.name: LayerInfo(chosen[x.name].strategy, chosen[x.name].products, found.facts[x.name].checks)
        for x in task.layers
    }
    return Diagonals(task.layers, {name: [v + zero for v in parts] for name, parts in values.items()}, info)
