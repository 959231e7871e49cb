"""Finding out the facts about every layer, as far as something depends on them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._torch.failures import is_users_own
from ..._torch.graph import elements_by_operation, leaves_of
from ..._torch.pytree import tensors_in
from ..._torch.vjp import gradients, stacked_vjp
from ...layers.selection import Layer
from ...layers.structure import linear_by_structure
from ...results import Strategy
from ..head import head_outputs, known_heads
from ..independence import block_diagonal, linear_products, sample_bits
from ..isolation import Result
from ..known_losses import loss_of_rows, softmax_scale
from ..loss import require_dependence
from ..losses_by_output import precise_share
from ..measurement import Measurement
from ..output_hessian import loss_of_output, output_points
from ..recorded_layer import layout_options, layouts_by_graph, unsettled
from ..recording import Recording, recorded
from .budget import Budget
from .chain import Chain, facts_of_chain, find_chain, shortened
from .choice import Choice, choose
from .facts import Facts
from .layer_by_operations import layers_by_operations
from .layer_graph import LayerGraph, OutputSide


@dataclass
class Findings:
    """What an investigation found."""

    facts: dict[str, Facts]  #: by layer
    graphs: dict[str, LayerGraph]  #: by layer, of those that have a rule
    output_side: OutputSide | None = None  #: for columns; None where they are not to be had, or would not pay
    seconds: float = 0.0  #: that the forward and the loss took
    #: the loss as a function of the output, where it is known to be a sum over samples and the graph may tell where
    #: these are
    separate: OutputSide | None = None
    chain: Chain | None = None  #: that leads to the layers, where one does
    #: recording and loss, where gradients are taken only if products are (see :func:`differentiate`)
    put_off: tuple[Recording, Tensor] | None = None

    def learn(self, name: str, **facts: Any) -> None:
        """Replace facts about a layer."""
        self.facts[name] = replace(self.facts[name], **facts)

    def chosen(self, budget: Budget) -> dict[str, Choice]:
        """By layer, the strategy that is chosen by the facts of now."""
        return choose(self.facts.values(), budget)

    def going_by(self, budget: Budget, *strategies: Strategy) -> list[str]:
        """The layers for which one of these is."""
        return [name for name, choice in self.chosen(budget).items() if choice.strategy in strategies]


def facts(task: Measurement) -> dict[str, Facts]:
    """All that is to be known of every layer."""
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        return investigate(task, recording, Budget("exact"), columns=True, everything=True).facts


def investigate(
    task: Measurement, recording: Recording, budget: Budget, *, columns: bool, everything: bool = False
) -> Findings:
    """Run the model once, and find out what the choice of strategies depends on: by the budget, what can matter.

    With ``columns``, these and the chain may be used; ``everything`` includes what the chain makes superfluous.
    """
    traced = task.traced(inputs=False)
    known = [x.name for x in task.layers if columns and task.certain and linear_by_structure(task.model, x.module)]
    put_off = columns and task.certain
    found, output, loss = attached(task, recording, traced, with_gradients=not put_off)
    if not (traced.hooked or traced.packed or task.certain or task.create_graph):
        _attach_by_operations(task, found, output, loss)
    side = _side(task, found, output, loss)
    if side is not None:
        side.by_graph = not traced.hooked
        found.separate = side if side.by_graph else None
    chain = columns and found.separate is not None and budget.method != "hutchinson" and not traced.packed
    if chain and not everything:
        _follow_chain(task, found, found.separate)
    if columns and side is not None and _without_chain(found, budget):
        found.output_side = _with_columns(task, found, side, known, budget)
    if put_off:
        found.put_off = recording, loss
        if not _needs_no_product(found, budget):
            differentiate(task, found)
    verify_samples(task, found, budget)
    if chain and everything:
        _follow_chain(task, found, found.separate)
    return found


def differentiate(task: Measurement, found: Findings) -> None:
    """Take the gradients that products with the Hessian are made of, where that was put off."""
    if found.put_off is not None:
        recording, loss = found.put_off
        found.put_off = None
        _learn_uses(task, found, recording, loss, with_gradients=True)


def attached(
    task: Measurement, recording: Recording, forward: Callable[[Any], Any] | None = None, *, with_gradients: bool = True
) -> tuple[Findings, Any, Tensor]:
    """Run the model once (by ``forward``), and find out which layers are used, and which by their recorded calls alone.

    With what was found, the model's output and the loss; ``with_gradients`` those in z, to be differentiated.
    """
    start = time.perf_counter()
    output, loss = task.loss(second_order=True, forward=forward)
    recording.close()
    seconds = time.perf_counter() - start
    if not loss.requires_grad:
        require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
    task.by_operation = elements_by_operation(loss)
    outputs = sum(t.numel() for t in tensors_in(output) if t.requires_grad)
    facts = {x.name: _first_facts(task, recording, x, outputs) for x in task.layers}
    graphs = {
        x.name: LayerGraph(x, recording.inputs.get(x.name, []), recording.leaves.get(x.name, [])) for x in task.ruled
    }
    found = Findings(facts, graphs, None, seconds)
    _learn_uses(task, found, recording, loss, with_gradients=with_gradients)
    recording.require_seen(loss)
    return found, output, loss


def _first_facts(task: Measurement, recording: Recording, layer: Layer, outputs: int) -> Facts:
    numel = sum(layer.sizes())
    sizes = {name: [leaf.numel() for leaf in leaves] for name, leaves in recording.leaves.items()}
    z = sum(sizes.get(layer.name, []))
    called = list(sizes)
    after = [n for name in called[called.index(layer.name) :] for n in sizes[name]] if layer.name in called else []
    every = [n for name in called for n in sizes[name]]
    return Facts(
        layer.name,
        numel,
        used=numel > 0,
        outputs=z // task.num_samples,
        passed=outputs + sum(after or every),
        passed_by_column=outputs,
        output_elements=max(2 * max(after, default=0), 2 * z, outputs),
        parameter_elements=max(4 * (numel + sum(t.numel() for t in tensors_in(task.inputs))), outputs + sum(every)),
    )


def _learn_uses(
    task: Measurement, found: Findings, recording: Recording, loss: Tensor, *, with_gradients: bool
) -> None:
    """Whether layers are used, and by their recorded calls alone.

    Gradients in z tell, which are kept to be differentiated; without them the graph, of where they would come from.
    """
    graphs = [found.graphs[x.name] for x in task.ruled]
    unusable = recording.unusable()
    ends = [leaf for graph in graphs for leaf in graph.leaves]
    ends += [s for graph in graphs for s in task.isolated.replacements(graph.layer)]
    by_leaf: dict[int, Tensor | None] = {}
    if with_gradients:
        by_leaf = dict(zip(map(id, ends), gradients(loss, ends, create_graph=True), strict=True))
    reached = {key for key, g in by_leaf.items() if g is not None} if with_gradients else leaves_of([loss]).keys()
    if len(graphs) == len(task.layers) and not any(id(x) in reached for x in ends):
        require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
    for graph in graphs:
        graph.output_gradients = [by_leaf.get(id(leaf)) for leaf in graph.leaves]
        outside = any(id(s) in reached for s in task.isolated.replacements(graph.layer))
        told = not outside and graph.layer.name not in unusable
        found.learn(graph.layer.name, own_use=told and not _feeds_itself(graph))
        if told and not any(id(leaf) in reached for leaf in graph.leaves):
            found.learn(graph.layer.name, used=False)


def _attach_by_operations(task: Measurement, found: Findings, output: Any, loss: Tensor) -> None:
    """The layers without a rule whose parameters are linear in the operations that take them."""
    for graph in layers_by_operations(task, output, loss):
        name = graph.layer.name
        found.graphs[name] = graph
        size = sum(leaf.numel() for leaf in graph.leaves)
        written = sum(p.numel() for key, p in graph.layer.parameters.items() if key in graph.written_out)
        elements = max(2 * size + 2 * task.num_samples * written, found.facts[name].passed_by_column)
        found.learn(name, own_use=True, outputs=size // task.num_samples, output_elements=elements)


def _needs_no_product(found: Findings, budget: Budget) -> bool:
    """Whether no layer takes products with the Hessian, which are zero by gradients that cannot be differentiated."""
    without = found.going_by(budget, Strategy.COLUMNS, Strategy.CHAIN, Strategy.UNUSED)
    return len(without) == len(found.facts)


def _feeds_itself(graph: LayerGraph) -> bool:
    """Whether a call's input depends on the output of another call of the layer."""
    if len(graph.leaves) == 1:
        return False
    ends = [x for call in graph.inputs for x in call if x.requires_grad]
    reached = gradients(ends, graph.leaves, [torch.ones_like(x) for x in ends]) if ends else []
    return any(r is not None for r in reached)


def _candidates(found: Findings) -> list[LayerGraph]:
    """The layers that act through z alone."""
    return [g for name, g in found.graphs.items() if found.facts[name].used and found.facts[name].own_use]


def _side(task: Measurement, found: Findings, output: Any, loss: Tensor) -> OutputSide | None:
    """The loss as a function of the output, if it goes by that alone and is a sum over samples."""
    candidates = _candidates(found)
    differentiable = [t for t in tensors_in(output) if t.requires_grad]
    if not candidates or not differentiable or any(task.dimension(t) is None for t in differentiable):
        return None
    by_output = loss_of_output(task.loss_again, output, task.targets, task.dimension, loss)
    if by_output is None or task.enters_model(by_output[0], [x for g in candidates for x in g.leaves]):
        return None  # the loss reaches into the model past its output
    again, points, _ = by_output
    output_gradients = gradients(again, points, create_graph=True)
    model_outputs = output_points(output, task.dimension)
    live = [i for i, g in enumerate(output_gradients) if g is not None]  # what the loss ignores has no columns
    side = OutputSide([model_outputs[i] for i in live], [points[i] for i in live], [output_gradients[i] for i in live])
    if loss_of_rows(task.loss_fn) and task.of_rows(output):
        side.scale = _scale_of_softmax(task, output)
        return side if live else None
    return side if live and block_diagonal(side.output_gradients, side.points, task.generator) else None


def _scale_of_softmax(task: Measurement, output: Tensor) -> float | None:
    """c, where the loss is by its definition a cross entropy with the Hessian c (diag p − p pᵀ) at each position."""
    share = precise_share(task, output)
    alone = None if share is None else softmax_scale(task.loss_fn, output, task.targets)
    return None if share is None or alone is None or task.dimension(output) != 0 else share * alone


def _follow_chain(task: Measurement, found: Findings, side: OutputSide | None) -> None:
    """Whether the graph is a chain that leads to the layers, and what it would cost."""
    assert side is not None
    found.chain = find_chain(task, side, [g for g in _candidates(found) if g.layer.rule is not None])
    if found.chain is not None:
        for name, facts in facts_of_chain(task, found.chain).items():
            found.learn(name, **facts)


def _without_chain(found: Findings, budget: Budget) -> list[LayerGraph]:
    """The layers that act through z alone and that the chain does not serve."""
    served = found.going_by(budget, Strategy.CHAIN)
    return [g for g in _candidates(found) if g.layer.name not in served]


def _with_columns(
    task: Measurement, found: Findings, side: OutputSide, known: Sequence[str], budget: Budget
) -> OutputSide | None:
    """Whether columns of a root of the loss's Hessian in the model's output may be pulled back, and would pay."""
    candidates = _without_chain(found, budget)
    heads = head_outputs(side.model_outputs, candidates, task.generator)

    # Whether it is known, without a look at numbers, that pulled back cotangents are Jᵀ times them, by sample.
    drawn = budget.method != "exact" and not unsettled(task, side.model_outputs, candidates, by_graph=side.by_graph)

    def pays(layers: Sequence[str]) -> bool:
        supposed: Any = {"piecewise_linear": True, "num_columns": side.size, "columns_drawn": drawn}
        facts = [replace(found.facts[x], **supposed, last=x in heads) for x in layers]
        by_columns = (Strategy.COLUMNS, Strategy.COLUMN_DRAWS)
        return any(choice.strategy in by_columns for choice in choose(facts, budget).values())

    if not pays([g.layer.name for g in candidates]):
        return None
    if heads:
        side.heads = known_heads(side.model_outputs, candidates, heads, side.find_root(task.chunk_size))
    for graph in candidates:
        if graph.layer.name in known or graph.layer.name in side.heads:
            found.learn(graph.layer.name, piecewise_linear=True)
        if graph.layer.name in side.heads and side.root is not None:
            found.learn(graph.layer.name, num_columns=side.root.num_columns, last=True)
    rest = [g for g in candidates if g.layer.name not in side.heads]
    if pays([g.layer.name for g in rest]):
        _piecewise_linear(task, found, side, [g for g in rest if g.layer.name not in known])
        certified = [g.layer.name for g in rest if found.facts[g.layer.name].piecewise_linear]
        # Draws take the Gauss-Newton part of all candidates from columns.
        if budget.method == "hutchinson" or pays(certified):
            number = side.find_root(task.chunk_size).num_columns
            for graph in rest:
                found.learn(graph.layer.name, num_columns=number, columns_drawn=drawn)
    return side


def _piecewise_linear(task: Measurement, found: Findings, side: OutputSide, graphs: list[LayerGraph]) -> None:
    """Whether ∂²⟨w, f⟩/∂z² = 0 exactly, w = ∂L/∂f fixed; what it is made of is kept as the graphs' residual."""
    if not graphs:
        return
    weighted = [
        (f, w.detach().requires_grad_(True))
        for f, w in zip(side.model_outputs, side.output_gradients, strict=True)
        if w is not None
    ]
    leaves = [leaf for graph in graphs for leaf in graph.leaves]
    first = gradients([f for f, _ in weighted], leaves, [w for _, w in weighted], create_graph=True)
    by_leaf = dict(zip((id(x) for x in leaves), first, strict=True))
    for graph in graphs:
        graph.residual = [by_leaf[id(leaf)] for leaf in graph.leaves]

    def residual_is_zero(group: list[LayerGraph]) -> list[bool]:
        inside = [leaf for graph in group for leaf in graph.leaves]
        for graph in group:
            graph.num_hvps += 1
        vectors = [task.random(leaf.shape, leaf)[None] for leaf in inside]
        products = stacked_vjp([by_leaf[id(leaf)] for leaf in inside], inside, vectors)
        zero = {id(leaf): not bool((r != 0).any()) for leaf, r in zip(inside, products, strict=True)}
        return [all(zero[id(leaf)] for leaf in graph.leaves) for graph in group]

    for graph, zero in zip(graphs, residual_is_zero(graphs), strict=True):
        # Jointly non-zero may be the doing of another layer's perturbation: ask the layer alone.
        alone = zero or (len(graphs) > 1 and residual_is_zero([graph])[0])
        found.learn(graph.layer.name, piecewise_linear=alone)


def _unverified(found: Findings, budget: Budget) -> list[LayerGraph]:
    """The layers of which it matters whether samples interact after them, and is not known."""
    others = found.going_by(budget, Strategy.COLUMNS, Strategy.CHAIN)
    known = {x for x, facts in found.facts.items() if facts.samples_independent is not None}.union(others)
    graphs = [g for g in _candidates(found) if g.layer.name not in known]
    if budget.method == "exact":  # draws go by z wherever they may
        graphs = [g for g in graphs if found.facts[g.layer.name].outputs <= g.numel]
    return graphs


def verify_samples(task: Measurement, found: Findings, budget: Budget) -> None:
    """Find for each layer a layout under which H_z is block diagonal over samples, where a strategy may need it."""
    graphs = _unverified(found, budget)
    if graphs:
        differentiate(task, found)
    rest = layouts_by_graph(found.separate.model_outputs, graphs) if found.separate is not None else graphs
    for graph in graphs:
        found.learn(graph.layer.name, samples_independent=graph not in rest)
    options = {id(graph): layout_options(graph, task.num_samples) for graph in rest}
    unsettled = [graph for graph in rest if options[id(graph)]]
    if not task.certain and unsettled:
        leaves = [leaf for graph in unsettled for leaf in graph.leaves]
        products = [g for graph in unsettled for g in graph.output_gradients]
        if not linear_products(products, leaves, task.generator):
            return
    for graph in unsettled:
        graph.layouts = options[id(graph)][0]
    if len(unsettled) > 1 and _independent(task, unsettled):  # one joint check serves all
        for graph in unsettled:
            found.learn(graph.layer.name, samples_independent=True)
        return
    for graph in unsettled:
        for layouts in options[id(graph)]:
            graph.layouts = layouts
            if _independent(task, [graph]):
                found.learn(graph.layer.name, samples_independent=True)
                break


def along_chain(task: Measurement, found: Findings, budget: Budget, work: Callable[[Chain], Result]) -> Result | None:
    """What ``work`` makes of the chain to the layers that it serves; None where it serves none.

    Nor does it where an operator cannot be differentiated so: other strategies get along, or tell which one it is.
    """
    layers = found.going_by(budget, Strategy.CHAIN)
    if not layers or found.chain is None:
        return None
    try:
        return work(shortened(found.chain, layers))
    except RuntimeError as error:
        if is_users_own(error):
            raise
    leave_chain(task, found, budget, layers)
    return None


def leave_chain(task: Measurement, found: Findings, budget: Budget, layers: Sequence[str]) -> None:
    """Make layers of the chain ready for the other strategies."""
    for name in layers:
        found.learn(name, chain_depth=0)
    differentiate(task, found)
    verify_samples(task, found, budget)


def _independent(task: Measurement, graphs: list[LayerGraph]) -> bool:
    """Whether the joint H_z of the layers is block diagonal over samples."""
    for graph in graphs:
        graph.num_hvps += len(sample_bits(task.num_samples))
    return block_diagonal(
        [g for graph in graphs for g in graph.output_gradients],
        [leaf for graph in graphs for leaf in graph.leaves],
        task.generator,
        [layout for graph in graphs for layout in graph.layouts],
    )
