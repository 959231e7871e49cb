"""Per-sample gradients of one layer, in the forms that they are kept in.

A layer that is linear in its parameters θ maps, for each sample n, a cotangent g_n on its output z_n to a gradient
J_nᵀ g_n on θ. A *rule* (:mod:`secorder.layers.rules`) is the function that does so for one layer type, for all samples
at once::

    rule(module, inputs, g) -> {parameter name: per-sample gradient}

``inputs`` are the tensors that the module was called with and ``g`` has the shape of its output, both with samples in
dim 0. A per-sample gradient is either dense, of shape ``(N, *parameter.shape)``, or an :class:`Outer`, two factors
whose product it is, never formed where it needn't be, or :class:`Rows`, zero but in a few rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layout import DIM_ZERO, Layout
from .patches import Patches, whole_input

__all__ = ["Outer", "PerSample", "Rows", "Rule"]

#: Elements of patches and of per-sample gradients that one step of a contraction may form: what stays in the caches
#: of a CPU (measured on convolutions: up to twice as fast as four times as many).
CHUNK_ELEMENTS = 1 << 20

#: The same where memory is plenty and each call costs a launch.
ACCELERATOR_CHUNK_ELEMENTS = 1 << 25


def chunk_elements(device: torch.device) -> int:
    """How many elements a step forms on a device."""
    return CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS


class Outer(NamedTuple):
    """A per-sample gradient in factors: ``Σ_p g[n, :, p, :]ᵀ a[n, :, p, :]``, reshaped to the parameter.

    Attributes:
        a: input factor, shape ``(N, groups, positions, in)``, perhaps as :class:`Patches`; None stands for a one at
            every position (a bias).
        g: cotangent factor, shape ``(N, groups, positions, out)``; the parameter has ``groups · out · in`` elements.
    """

    a: Tensor | Patches | None
    g: Tensor


class Rows(NamedTuple):
    """A per-sample gradient that is zero but in a few rows of the parameter: row ``ids[n, p]`` gets ``g[n, p]``.

    Attributes:
        ids: shape ``(N, positions)``; a row may come more than once, and gets the sum.
        g: cotangents, shape ``(N, positions, width)``.
        rows: number of the parameter's rows.
    """

    ids: Tensor
    g: Tensor
    rows: int


PerSample = Outer | Rows | Tensor

Rule = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Mapping[str, PerSample]]


def per_sample_gradients(
    rule: Rule,
    module: nn.Module,
    calls: Sequence[tuple[tuple[Tensor, ...], Tensor]],
    layouts: Sequence[Layout] | None = None,
) -> dict[str, PerSample]:
    """J_nᵀ g_n of a layer for every sample, by parameter, summed over the layer's calls in one forward.

    Of each call there are the input tensors and a cotangent of the output's shape, and perhaps where the samples are.
    """
    parts = []
    for index, (inputs, g) in enumerate(calls):
        layout = layouts[index] if layouts else DIM_ZERO
        if layout.dim:
            inputs, g = tuple(x.movedim(layout.dim, 0) for x in inputs), g.movedim(layout.dim, 0)
        gradients = dict(rule(module, inputs, g))
        if layout.rows > 1:
            gradients = {name: _regroup(gradient, layout) for name, gradient in gradients.items()}
        parts.append(gradients)
    return parts[0] if len(parts) == 1 else {name: merge([part[name] for part in parts]) for name in parts[0]}


def stacked_gradients(
    rule: Rule,
    module: nn.Module,
    inputs: Sequence[tuple[Tensor, ...]],
    cotangents: Sequence[Tensor],
    layouts: Sequence[Layout] | None = None,
) -> dict[str, PerSample]:
    """:func:`per_sample_gradients` for K cotangents at once: each call's has shape ``(K, *output.shape)``.

    What does not depend on the cotangent (the input factor of an :class:`Outer`, the ids of :class:`Rows`) is shared
    by all K; their ``g``, or the dense gradient, is stacked in dim 0.
    """

    def gradients(*gs: Tensor) -> dict[str, PerSample]:
        return per_sample_gradients(rule, module, list(zip(inputs, gs, strict=True)), layouts)

    return stacked(gradients, cotangents)


def stacked(gradients: Callable[..., dict[str, PerSample]], cotangents: Sequence[Tensor]) -> dict[str, PerSample]:
    """A function from cotangents to per-sample gradients, for K of each at once (see :func:`stacked_gradients`)."""

    def cotangent_factors(*gs: Tensor) -> dict[str, Tensor]:
        return {name: part if isinstance(part, Tensor) else part.g for name, part in gradients(*gs).items()}

    first = gradients(*(c[0] for c in cotangents))
    if len(cotangents[0]) == 1:
        return {name: with_cotangents(part, lambda g: g[None]) for name, part in first.items()}
    factors = torch.vmap(cotangent_factors)(*cotangents)
    return {name: with_cotangents(part, lambda _, name=name: factors[name]) for name, part in first.items()}  # type: ignore[misc]


def with_cotangents(gradient: PerSample, change: Callable[[Tensor], Tensor]) -> PerSample:
    """A per-sample gradient with its cotangent factor changed, in which it is linear; of a dense one, itself."""
    return change(gradient) if isinstance(gradient, Tensor) else gradient._replace(g=change(gradient.g))


def weighted(gradient: PerSample, weights: Tensor) -> PerSample:
    """A per-sample gradient with each sample's, perhaps of each of K cotangents, multiplied by a number."""
    w = weights
    return with_cotangents(gradient, lambda g: g * w.to(g).view(*w.shape, *(1,) * (g.dim() - w.dim())))


def _regroup(gradient: PerSample, layout: Layout) -> PerSample:
    if isinstance(gradient, Rows):  # (N·T, P) -> (N, T·P)
        ids, g = (layout.split(t).flatten(1, 2) for t in (gradient.ids, gradient.g))
        return Rows(ids, g, gradient.rows)
    if isinstance(gradient, Outer):  # (N·T, G, P, k) -> (N, G, T·P, k)

        def grouped(factor: Tensor) -> Tensor:
            return layout.split(factor).movedim(1, 2).flatten(2, 3)

        return Outer(None if gradient.a is None else grouped(whole_input(gradient.a)), grouped(gradient.g))
    return layout.split(gradient).sum(1)


def form_of(part: PerSample) -> tuple[Any, ...]:
    """What per-sample gradients of one parameter have in common that :func:`merge` adds up."""
    if isinstance(part, Outer):
        return "outer", part.a is None, part.g.shape[1], part.g.shape[3]
    return ("rows",) if isinstance(part, Rows) else ("dense",)


def merge(parts: Sequence[PerSample]) -> PerSample:
    """The sum of per-sample gradients in one form."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Outer):
        inputs = [part.a for part in parts]  # type: ignore[union-attr]
        a = None if inputs[0] is None else torch.cat([whole_input(x) for x in inputs if x is not None], 2)
        return Outer(a, torch.cat([part.g for part in parts], 2))  # type: ignore[union-attr]
    if isinstance(parts[0], Rows):
        ids = torch.cat([part.ids for part in parts], 1)  # type: ignore[union-attr]
        return Rows(ids, torch.cat([part.g for part in parts], 1), parts[0].rows)  # type: ignore[union-attr]
    return torch.stack(list(parts)).sum(0)  # type: ignore[arg-type]


def sum_in_forms(parts: Sequence[PerSample], numel: int) -> list[PerSample]:
    """The sum of per-sample gradients of one parameter: in one form, or as an :class:`Outer` and :class:`Rows`.

    These two, an embedding and the head that is tied to it, are kept apart: written out, each sample's rows of the
    table would take the whole parameter's size. What their product needs is :func:`in_rows`.
    """
    forms: dict[tuple[Any, ...], list[PerSample]] = {}
    for part in parts:
        forms.setdefault(form_of(part), []).append(part)
    merged = sorted(map(merge, forms.values()), key=lambda part: isinstance(part, Rows))
    first, last = merged[0], merged[-1]
    plain = isinstance(first, Outer) and first.a is not None and first.g.shape[1] == 1
    if len(merged) == 1 or (len(merged) == 2 and plain and isinstance(last, Rows)):
        return merged
    return [torch.stack([dense(part, numel) for part in merged]).sum(0)]


def in_rows(outer: Outer, rows: Rows) -> Tensor:
    """The entries of an outer product in the rows of the other times the other's, shape ``(N, positions, width)``."""
    assert outer.a is not None
    columns = outer.g[:, 0].gather(2, rows.ids[:, None].expand(-1, outer.g.shape[2], -1))
    return torch.bmm(columns.transpose(1, 2), whole_input(outer.a)[:, 0]) * rows.g


def distinct_rows(part: Rows) -> tuple[Tensor, Tensor]:
    """The distinct rows of each sample, ``n · rows + row``, and which of them each position's is, flat.

    Zeros are behind them: of a size that no host has to wait for. Of a table that has fewer rows than there are
    positions, all rows.
    """
    offset = torch.arange(len(part.ids), device=part.ids.device)[:, None] * part.rows
    places = (part.ids + offset).flatten()
    if part.rows <= part.ids.shape[1]:
        return torch.arange(len(part.ids) * part.rows, device=places.device), places
    ordered, order = places.sort()
    number = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)[: len(ordered)]
    distinct, where = torch.zeros_like(ordered), torch.empty_like(ordered)
    return distinct.scatter_(0, number, ordered), where.scatter_(0, order, number)


def dense(gradient: PerSample, numel: int) -> Tensor:
    """Per-sample gradients written out, shape ``(N, numel)``."""
    if isinstance(gradient, Tensor):
        return gradient.reshape(len(gradient), numel)
    if isinstance(gradient, Outer):
        if gradient.a is None:
            return gradient.g.sum(2).reshape(len(gradient.g), numel)
        return torch.matmul(gradient.g.transpose(2, 3), whole_input(gradient.a)).reshape(len(gradient.g), numel)
    index = gradient.ids.unsqueeze(-1).expand_as(gradient.g)
    written = gradient.g.new_zeros(len(gradient.g), gradient.rows, gradient.g.shape[-1])
    return written.scatter_add(1, index, gradient.g).reshape(len(gradient.g), numel)


def total_gradient(gradient: PerSample, numel: int) -> Tensor:
    """Σ_n of per-sample gradients, flat: the layer's whole gradient, as far as it is explained by them."""
    if isinstance(gradient, Tensor):
        return gradient.reshape(len(gradient), numel).sum(0)
    if isinstance(gradient, Rows):
        total = gradient.g.new_zeros(gradient.rows, gradient.g.shape[-1])
        return total.index_add(0, gradient.ids.flatten(), gradient.g.flatten(0, 1)).reshape(numel)
    g = gradient.g.transpose(0, 1).flatten(1, 2)  # (groups, N · positions, out)
    if gradient.a is None:
        return g.sum(1).reshape(numel)
    if isinstance(gradient.a, Patches):  # a few samples' patches at a time
        samples = max(1, chunk_elements(g.device) // max(1, math.prod(gradient.a.shape[1:])))
        parts = gradient.g.split(samples)
        starts = range(0, len(gradient.g), samples)
        return torch.stack(
            [
                total_gradient(Outer(gradient.a[i : i + samples], part), numel)
                for i, part in zip(starts, parts, strict=True)
            ]
        ).sum(0)
    return torch.bmm(g.transpose(1, 2), gradient.a.transpose(0, 1).flatten(1, 2)).reshape(numel)
