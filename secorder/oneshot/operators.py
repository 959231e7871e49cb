"""Curvature as an operator: products of each layer's block with a vector, for the Hessian, the GGN and the Fisher.

The Hessian's block of a layer is ∂²L/∂θ² for its parameters θ together. Where the layer is linear in θ, and θ acts only
through the layer's calls, it is ``Jᵀ H_z J``: a product takes the layer itself (J v), one Hessian-vector product on the
graph after the layer, and the layer's rule (Jᵀ u). Elsewhere it is a product on the parameters. The blocks of the GGN
and of the empirical Fisher are ``(1/N) Jᵀ M J`` with J the Jacobian of the model's output, and, sample by sample,
M = ∂²ℓ_n/∂f_n² or M = g_n g_nᵀ with g_n = ∂ℓ_n/∂f_n.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .._torch.modules import parameters_replaced
from .._torch.vjp import gradients, split_like, stacked_vjp
from ..errors import InvalidArgumentError
from ..layers.dtypes import cast, rounding
from ..layers.per_sample import total_gradient, with_cotangents
from ..layers.selection import Layer
from .cotangents import require_linear_backward
from .fisher import require_independent_samples
from .hessian.investigate import attached
from .hessian.layer_graph import LayerGraph
from .hessian.on_parameters import on_parameters
from .losses_by_output import SampleLosses, losses_by_output
from .measurement import Measurement
from .output_hessian import as_samples, filled
from .recorded_layer import layout_options
from .recording import recorded
from .roots import Single

__all__ = ["operators"]

#: Which curvature: of the loss as given, its generalised Gauss-Newton part (the type-2 Fisher), the empirical Fisher.
Curvature = Literal["hessian", "ggn", "fisher"]

#: What a block is made of: a layer's parameters together, or one parameter.
By = Literal["layer", "parameter"]

#: A layer's block times a flat vector.
Operator = Callable[[Tensor], Tensor]

#: Each layer with its block.
Blocks = Generator[tuple[Layer, Operator | None], None, None]


def operators(task: Measurement, of: Curvature) -> Blocks:
    """Each layer with its block as an operator, None where that is zero; to be used while iterated over, and closed."""
    return _hessian_operators(task) if of == "hessian" else _output_operators(task, of)


def blocks_of(layer: Layer, by: By) -> dict[str, slice]:
    """The blocks of a layer by name, and where their elements are among the layer's."""
    sizes = layer.sizes()
    if by == "layer":
        return {layer.name: slice(0, sum(sizes))}
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return {
        layer.parameter_name(local): slice(start, start + size)
        for local, start, size in zip(layer.parameters, starts, sizes, strict=True)
    }


def _hessian_operators(task: Measurement) -> Blocks:
    rest = []
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        found, _, _ = attached(task, recording)
        for layer in task.layers:
            facts, graph = found.facts[layer.name], found.graphs.get(layer.name)
            if not facts.used:
                yield layer, None
                continue
            product = _product_in_z(task, graph) if facts.own_use and graph is not None else None
            if product is None:
                rest.append(layer)
            else:
                yield layer, product
    del found
    for layer, own in on_parameters(task, rest):
        yield layer, ProductOnParameters.of(task, layer, own)


def _product_in_z(task: Measurement, graph: LayerGraph) -> "ProductInZ | None":
    """The layer's block by its calls: which rows belong to which sample does not matter to their sum."""
    for layouts in layout_options(graph, task.num_samples):
        graph.layouts = layouts
        product = ProductInZ(graph)
        if product.adjoint(task):
            return product
    return None


@dataclass(frozen=True, eq=False)
class ProductInZ:
    """v ↦ Jᵀ H_z J v of a layer by its part of the graph."""

    graph: LayerGraph

    @cached_property
    def constant(self) -> list[Tensor]:
        """What each call adds that does not depend on θ: its output where θ is zero."""
        zero = {name: torch.zeros_like(p) for name, p in self.graph.layer.parameters.items()}
        with torch.no_grad():
            return [_call(self.graph, zero, call) for call in self.graph.inputs]

    def __call__(self, v: Tensor) -> Tensor:
        """The product with a flat vector."""
        graph = self.graph
        return self.back(stacked_vjp(graph.output_gradients, graph.leaves, self.forth(v))).to(v.dtype)

    @property
    def gradient(self) -> Tensor:
        """The loss's gradient in the layer's parameters, flat."""
        return self.back([g.detach()[None] for g in filled(self.graph.output_gradients, self.graph.leaves)])

    def forth(self, v: Tensor) -> list[Tensor]:
        """J v by call, each shape ``(1, *z.shape)``."""
        graph, parameters = self.graph, self.graph.layer.parameters
        parts = split_like(v[None], list(parameters.values()))
        along = {name: part[0] for name, part in zip(parameters, parts, strict=True)}
        with torch.no_grad():  # z is affine in θ: J v is the difference of two calls
            calls = zip(graph.inputs, self.constant, graph.leaves, strict=True)
            return [(_call(graph, along, x) - constant).to(leaf.dtype)[None] for x, constant, leaf in calls]

    def back(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Jᵀ u of cotangents by call, each shape ``(1, *z.shape)``: flat."""
        found = self.graph.gradients(cotangents)
        parts = [
            total_gradient(with_cotangents(found[name], lambda g: g[0]), p.numel())
            for name, p in self.graph.layer.parameters.items()
        ]
        return torch.cat(parts)

    def adjoint(self, task: Measurement) -> bool:
        """Whether ``⟨J v, u⟩ = ⟨v, Jᵀ u⟩`` for random v and u, to rounding: where the rule is one for the calls."""
        cotangents = [task.random((1, *leaf.shape), leaf) for leaf in self.graph.leaves]
        back = self.back(cotangents)
        v = task.random(back.shape, back)
        try:
            along = self.forth(v)
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False  # its calls took more than tensors: the size of a transposed convolution's output, say
        if any(t.shape != u.shape for t, u in zip(along, cotangents, strict=True)):
            return False
        forth = torch.cat([(t * u).flatten() for t, u in zip(along, cotangents, strict=True)]).to(back.dtype)
        kinds = {t.dtype for t in (*self.graph.leaves, *self.graph.layer.parameters.values())}
        size = torch.maximum(forth.norm(), (v * back).norm())
        return bool((forth.sum() - v @ back).abs() <= max(map(rounding, kinds)) * size)


def _call(graph: LayerGraph, parameters: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """The layer's output with other parameters, past its hooks, which would record the call; never under autocast."""
    module = graph.layer.module
    kind = next(iter(parameters.values())).dtype
    with parameters_replaced(module, parameters):
        output: Tensor = module.forward(*(cast(x, kind) for x in inputs))
        return output


@dataclass(frozen=True, eq=False)
class ProductOnParameters:
    """v ↦ H v by the loss's gradient in the layer's replacement parameters, differentiable."""

    replacements: Sequence[Tensor]
    output_gradients: Sequence[Tensor | None]

    @classmethod
    def of(
        cls, task: Measurement, layer: Layer, output_gradients: Sequence[Tensor | None]
    ) -> "ProductOnParameters | None":
        """That of a layer; None where the loss does not depend on it."""
        used = any(g is not None for g in output_gradients)
        return cls(task.isolated.replacements(layer), output_gradients) if used else None

    def __call__(self, v: Tensor) -> Tensor:
        """The product with a flat vector."""
        return _flat(stacked_vjp(self.output_gradients, self.replacements, split_like(v[None], self.replacements)), v)

    @property
    def gradient(self) -> Tensor:
        """The loss's gradient, flat."""
        return torch.cat([g.flatten() for g in filled(self.output_gradients, self.replacements)]).detach()


def _flat(found: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([u.flatten() for u in found]).to(like.dtype)


def _output_operators(task: Measurement, of: Curvature) -> Blocks:
    if task.owned is not None:
        raise InvalidArgumentError(
            f"of={of!r} needs samples that a dimension of the inputs holds, not entries of a list or graphs: pass a "
            'data set of batches of one, or take of="hessian".'
        )
    output, loss = task.loss()
    side = losses_by_output(task, output, loss, [], second_order=of == "ggn") if loss.requires_grad else None
    if side is None:
        raise InvalidArgumentError(
            f"of={of!r} needs a loss that loss_fn computes from the model's output, cut into samples: here it comes "
            "from inside the model (compute it from the logits), or the network is inside of the loss (leave a penalty "
            'of the weights out); or pass of="hessian".'
        )
    require_independent_samples(task, output)
    metric = _metric(task, side, of)
    outputs = side.model_outputs
    weights = [torch.zeros_like(f).requires_grad_() for f in outputs]
    replacements = [s for layer in task.layers for s in task.isolated.replacements(layer)]
    if not task.certain:
        random = torch.cat([as_samples(task.random(f.shape, f)) for f in outputs], 1)
        require_linear_backward(outputs, replacements, Single(random), task.generator)
    for layer in task.layers:
        yield layer, _product_by_output(task, layer, outputs, weights, metric)


def _metric(task: Measurement, side: SampleLosses, of: Curvature) -> Callable[[list[Tensor]], list[Tensor]]:
    """v ↦ M v / N on the model's output, sample by sample."""
    output_gradients = side.gradients
    count = task.num_samples

    def ggn(vectors: list[Tensor]) -> list[Tensor]:
        return [u / count for u in stacked_vjp(output_gradients, side.points, vectors)]

    fixed = filled(output_gradients, side.points)

    def fisher(vectors: list[Tensor]) -> list[Tensor]:
        inner = sum(as_samples(g * v[0]).sum(1) for g, v in zip(fixed, vectors, strict=True))
        assert isinstance(inner, Tensor)
        return [(g * inner.view(-1, *(1,) * (g.dim() - 1)) / count)[None] for g in fixed]

    return ggn if of == "ggn" else fisher


def _product_by_output(
    task: Measurement,
    layer: Layer,
    outputs: list[Tensor],
    weights: list[Tensor],
    metric: Callable[[list[Tensor]], list[Tensor]],
) -> Operator | None:
    """v ↦ Jᵀ M J v, with J v the derivative of wᵀJ v by w."""
    replacements = task.isolated.replacements(layer)
    reached = gradients(outputs, replacements, weights, create_graph=True)
    if all(g is None for g in reached):
        return None

    def product(v: Tensor) -> Tensor:
        tangents = stacked_vjp(reached, weights, split_like(v[None], replacements))
        return _flat(stacked_vjp(outputs, replacements, metric(tangents)), v)

    return product
