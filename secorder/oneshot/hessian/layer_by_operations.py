"""Layers without a rule whose parameters are linear in the operations that take them.

Of z = a W, γ ⊙ x̂, a table's rows or a position table that is added, with what is not the layer's as it is, z is an
affine map of the parameters: their Hessian is Jᵀ H_z J, as that of a layer with a rule. The operations are found in the
graph, where they must be all that the parameters do, and their factors must not depend on the layer itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._torch.graph import Node, Users, nodes_behind, outputs_of, shape_of, users_of
from ..._torch.pytree import tensors_in
from ..._torch.sample_graph import SHARED, InnerSizes, inner_size, samples_in_nodes
from ..._torch.vjp import gradients, placeholder
from ...errors import AttributionError
from ...layers.dtypes import cast, compute_dtype
from ...layers.layout import layout_of
from ...layers.operations import MAPS, OPERATIONS, OperationCall
from ...layers.per_sample import PerSample, dense, stacked
from ...layers.selection import Layer
from ...layers.uses import Route, Use, Uses, carried, find_uses, hidden, pieces
from ..measurement import Measurement
from .layer_graph import LayerGraph

#: By operation, the inputs that it is linear in, one at a time: each multiplies what the others hold.
FACTORS = {
    "MmBackward0": (0, 1),
    "AddmmBackward0": (1, 2),
    "BmmBackward0": (0, 1),
    "MulBackward0": (0, 1),
    "DivBackward0": (0, 1),
    "ConvolutionBackward0": (0, 1),
    "NativeLayerNormBackward0": (0, 1),
}

#: Operations that are linear in all of their inputs together.
SUMS = frozenset({
    "AddBackward0", "SubBackward0", "ExpandBackward0", "EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0",
})  # fmt: skip

#: Inputs that an operation is not linear in.
NOT_LINEAR = {"DivBackward0": 1, "NativeLayerNormBackward0": 0}

#: How often operations that all samples share are followed further.
ROUNDS = 24


@dataclass(eq=False)
class LayerByOperations(LayerGraph):
    """A layer's part of the graph, by the operations that take its parameters: each of them is a call."""

    uses: Uses = field(default_factory=lambda: Uses({}, {}))  #: the operations, and what leads to them
    count: int = 0  #: number of samples
    #: parameters whose per-sample gradients are no factor times another that the cotangents leave alone
    written_out: frozenset[str] = frozenset()

    def gradients(self, cotangents: Sequence[Tensor]) -> dict[str, PerSample]:
        """Per-sample gradients of K stacked cotangents on what the operations computed."""
        kind = compute_dtype(self.layer)
        return stacked(self._pulled_back, [cast(c, kind) for c in cotangents])

    def gradient(self, cotangents: Sequence[Tensor]) -> dict[str, PerSample]:
        """Those of one cotangent on each operation."""
        kind = compute_dtype(self.layer)
        return self._pulled_back(*[cast(c, kind) for c in cotangents])

    def _pulled_back(self, *cotangents: Tensor) -> dict[str, PerSample]:
        uses, brought = self.uses, []
        for use, g, layout in zip(uses.uses, cotangents, self.settled, strict=True):
            call = OperationCall(use.node, [g], [layout], self.count, compute_dtype(self.layer))
            for index, source in use.sources.items():
                part = OPERATIONS[use.node.name()](call, index)
                if part is None:
                    raise AttributionError(f"{use.node.name()} is none that its rule is for.")
                brought.append(list(carried(part, source, uses.leaves, uses.followed)))
        found = pieces(brought)
        if found.keys() != self.layer.parameters.keys() or any(len(parts) > 1 for parts in found.values()):
            raise AttributionError(f"the uses of layer {self.layer.name!r} have no common form.")
        return {
            name: dense(found[name][0], p.numel()) if name in self.written_out else found[name][0]
            for name, p in self.layer.parameters.items()
        }

    def settle_forms(self) -> None:
        """Find out which parameters' per-sample gradients are written out.

        Raises :class:`AttributionError` where a rule is not for what the operations computed, or there is no common
        form.
        """
        with torch.no_grad():
            one = self._pulled_back(*[torch.ones_like(leaf) for leaf in self.leaves])
            two = self._pulled_back(*[torch.full_like(leaf, 2) for leaf in self.leaves])
        factors = {
            name: [part if isinstance(part, Tensor) else part.g for part in (one[name], two[name])] for name in one
        }
        self.written_out = frozenset(name for name, (g, twice) in factors.items() if not torch.equal(2 * g, twice))


def layers_by_operations(task: Measurement, output: Any, loss: Tensor) -> list[LayerByOperations]:
    """Those of a measurement's layers without a rule whose parameters are linear in operations with a rule.

    The model puts no hooks on its tensors, nor checkpoints.
    """
    layers = [x for x in task.layers if x.rule is None]
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    dims = [task.dimension(t) for t in outputs]
    if not layers or task.num_samples == 1 or not outputs or None in dims or not loss.requires_grad:
        return []
    sizes = [inner_size(f.shape, dim or 0) for f, dim in zip(outputs, dims, strict=True)]
    told = samples_in_nodes(outputs, task.num_samples, sizes)
    users = users_of([loss])
    found = []
    for layer in layers:
        uses = _uses(task, layer, users, told)
        graph = None if uses is None else _graph(layer, uses, told, task.num_samples)
        if graph is not None:
            found.append(graph)
    leaves = [leaf for graph in found for leaf in graph.leaves]
    by_leaf = dict(zip(map(id, leaves), gradients(loss, leaves, create_graph=True), strict=True))
    for graph in found:
        graph.output_gradients = [by_leaf[id(leaf)] for leaf in graph.leaves]
    return found


def _uses(task: Measurement, layer: Layer, users: Users, told: InnerSizes) -> Uses | None:
    """The operations in which a layer's parameters meet samples, where these are all that they do, and linear."""
    parameters = dict(zip(layer.parameters, task.isolated.replacements(layer), strict=True))
    routes: frozenset[Route] = frozenset()
    for _ in range(ROUNDS):
        uses = find_uses(users, parameters, routes)
        if uses is None or not uses.uses or hidden(uses):
            return None
        shared = [use for use in uses.uses if all(told.get((use.node, o.number)) == SHARED for o in use.outputs)]
        if not shared:
            break
        routes |= {route for use in shared for route in use.routes}
    else:
        return None
    between = [node for node in uses.followed if node not in uses.leaves]
    if not all(map(_carries_on, between)) or not all(_linear(use) for use in uses.uses):
        return None
    factors = [
        before
        for use in uses.uses
        for i, (before, _) in enumerate(use.node.next_functions)
        if before is not None and i not in use.sources and _multiplies(use)
    ]
    own = {use.node for use in uses.uses} | set(uses.leaves)
    return None if any(node in own for node in nodes_behind(factors)) else uses


def _carries_on(node: Node) -> bool:
    """Whether an operation between a parameter and those that meet samples is linear in what comes from parameters."""
    name, given = node.name(), [i for i, (before, _) in enumerate(node.next_functions) if before is not None]
    return name in MAPS and (name not in FACTORS or (len(given) == 1 and given[0] != NOT_LINEAR.get(name)))


def _linear(use: Use) -> bool:
    """Whether an operation with a rule is linear in all of its inputs that lead to the layer, together."""
    name, given = use.node.name(), list(use.sources)
    if name not in OPERATIONS or NOT_LINEAR.get(name) in given:
        return False
    return name in SUMS or (name in FACTORS and sum(i in FACTORS[name] for i in given) <= 1)


def _multiplies(use: Use) -> bool:
    """Whether what reaches the layer by an operation depends on the operation's other inputs."""
    return any(i in FACTORS.get(use.node.name(), ()) for i in use.sources)


def _graph(layer: Layer, uses: Uses, told: InnerSizes, count: int) -> LayerByOperations | None:
    """The layer's part, where the graph tells where samples are in all that its operations computed."""
    leaves, layouts = [], []
    for use in uses.uses:
        reached = [o.number for o in outputs_of(use.node) if (use.node, o.number) in told]
        layout = layout_of(shape_of(use.node, 0), count, told[use.node, 0]) if reached == [0] else None
        if layout is None:
            return None
        leaves.append(placeholder(use.node, 0))
        layouts.append(layout)
    graph = LayerByOperations(layer, [], leaves, layouts, layouts, uses=uses, count=count)
    try:  # of forms that cannot be added, of shapes that a rule is not for
        graph.settle_forms()
    except AttributionError:
        return None
    return graph
