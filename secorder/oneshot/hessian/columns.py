"""Columns of a root of the output Hessian, where the model is piecewise linear after the layer: all layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._torch.vjp import stacked_vjp
from ...layers.dtypes import rounding
from ...monitor.progress import progress_bar
from ...results import Strategy
from ..head import Head, contract_head
from ..measurement import Measurement
from ..output_hessian import as_samples
from ..recorded_layer import contract_pairs, settle, unsettled
from ..roots import Root
from .budget import Budget
from .facts import Facts
from .layer_graph import LayerGraph, OutputSide

NAME = Strategy.COLUMNS


def applies(facts: Facts) -> bool:
    """Where parameters act through z alone, and the model is piecewise linear from there to outputs that do."""
    return bool(facts.own_use and facts.piecewise_linear and facts.num_columns)


def products(facts: Facts, budget: Budget) -> int:
    """One for each output of a sample, for all layers together; none for what is an output itself."""
    return 0 if facts.last else facts.num_columns


def run(task: Measurement, side: OutputSide, graphs: Sequence[LayerGraph]) -> list[list[Tensor] | None]:
    """For each layer the diagonal of Jᵀ H_out J by parameter, or None where its rows do not belong to samples.

    Pulled-back columns are only what they are taken for where the backward pass multiplies with the Jacobian. So they
    must explain the Hessian: for random v and v', ``v'ᵀ H_z v`` is, sample by sample, that of the columns and of what
    they do not give (nothing, after which the model is piecewise linear). Where they do not, none is served.
    """
    root = side.find_root(task.chunk_size)
    untold = unsettled(task, side.model_outputs, graphs, by_graph=side.by_graph)
    check = _Bilinear(task, graphs, side, root) if untold else None
    found: dict[int, list[Tensor] | None] = {}
    for graph in graphs:
        if graph.layer.name in side.heads:
            head = side.heads[graph.layer.name]
            found[id(graph)] = contract_head(graph, side.model_outputs, head, root)
            if check is not None:
                check.head(graph, head)
    rest = [graph for graph in graphs if id(graph) not in found]
    with progress_bar(task.progress and bool(rest), "Hessian by columns", root.num_columns, unit="vjps") as advance:
        pulled = settle(task, side.model_outputs, rest, root, [graph for graph in untold if graph in rest])
        values = contract_pairs(task, side.model_outputs, rest, root, advance=advance, plain=pulled, watch=check)
    found |= dict(zip(map(id, rest), values if rest else [], strict=True))
    for graph in graphs:
        graph.num_hvps += (root.num_columns if graph in rest else 1) + (3 if untold else 0)
    served = [g for g in graphs if found[id(g)] is not None]
    if check is not None and served and not check.holds(served):
        return [None] * len(graphs)
    return [found[id(g)] for g in graphs]


class _Bilinear:
    """``v'ᵀ H_z v`` by columns, layer by layer and sample by sample, added up while they pass."""

    def __init__(self, task: Measurement, graphs: Sequence[LayerGraph], side: OutputSide, root: Root) -> None:
        self.side = side
        self.root = root
        leaves = [leaf for graph in graphs for leaf in graph.leaves]
        self.vectors = {id(x): (task.random(x.shape, x), task.random(x.shape, x)) for x in leaves}
        self.found: dict[int, Tensor] = {}
        self.size: dict[int, Tensor] = {}

    def __call__(
        self, layers: Sequence[LayerGraph], u: dict[int, Tensor], v: dict[int, Tensor] | None, sign: Tensor | None
    ) -> None:
        """Some columns pass."""
        for graph in layers:
            products = self._dot(graph, u, 0) * self._dot(graph, u if v is None else v, 1)
            if sign is not None:
                products = products * sign
            for total, part in ((self.found, products.sum(0)), (self.size, products.abs().sum(0))):
                total[id(graph)] = total[id(graph)] + part if id(graph) in total else part

    def head(self, graph: LayerGraph, head: Head) -> None:
        """A layer whose z is an output: what the columns would add up to is the loss's Hessian itself."""
        (v, other), point = self.vectors[id(graph.leaves[0])], self.side.points[head.which]
        (u,) = stacked_vjp([self.side.output_gradients[head.which]], [point], [head.in_output(v).to(point)[None]])
        products = head.in_z(u[0]) * other
        self.found[id(graph)] = as_samples(products).sum(1)
        self.size[id(graph)] = as_samples(products.abs()).sum(1)

    def _dot(self, graph: LayerGraph, u: dict[int, Tensor], which: int) -> Tensor:
        """⟨u_n, v_n⟩ over all calls, shape (K, N)."""
        calls = []
        for leaf, layout in zip(graph.leaves, graph.layouts, strict=True):
            weighted = u[id(leaf)].detach() * self.vectors[id(leaf)][which]
            calls.append(torch.stack([as_samples(layout.split(w)).sum(1) for w in weighted]))
        return torch.stack(calls).sum(0)

    def holds(self, graphs: Sequence[LayerGraph]) -> bool:
        """Whether the Hessian says the same, to rounding."""
        for graph in graphs:
            whole = self._by_hessian(graph, graph.output_gradients)
            rest = self._by_hessian(graph, graph.residual)
            bound = torch.maximum(self.size[id(graph)], torch.maximum(whole.abs(), rest.abs()))
            bound = bound * rounding(graph.leaves[0].dtype) * max(1.0, self.root.num_columns**0.5)
            if not bool(((whole - rest - self.found[id(graph)]).abs() <= bound).all()):
                return False
            graph.num_hvps += 1
        return True

    def _by_hessian(self, graph: LayerGraph, output_gradients: Sequence[Tensor | None]) -> Tensor:
        if not output_gradients:
            return torch.zeros_like(self.found[id(graph)])
        vectors = [self.vectors[id(leaf)] for leaf in graph.leaves]
        found = stacked_vjp(output_gradients, graph.leaves, [v[None] for v, _ in vectors])
        parts = zip(found, vectors, graph.layouts, strict=True)
        return torch.stack([as_samples(layout.split(u[0] * w)).sum(1) for u, (_, w), layout in parts]).sum(0)
