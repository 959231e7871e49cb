"""Layers by their recorded outputs z: cotangents on the model's output pulled back to every z and contracted there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._torch.sample_graph import SHARED, samples_in_leaves, samples_in_nodes
from .._torch.vjp import chunks, default_chunk_size
from ..errors import AttributionError
from ..layers.contraction import contract
from ..layers.dtypes import cast, compute_dtype, zeros
from ..layers.layout import DIM_ZERO, Layout, candidate_layouts
from ..layers.per_sample import PerSample, Rule, per_sample_gradients, stacked_gradients, weighted
from ..layers.rank_one import rank_one, squares_by_onednn
from ..layers.rules import takes_any_leading_dim
from ..layers.selection import Layer
from .cotangents import pull_back
from .independence import rows_weighted, sample_weights, weight_draws
from .measurement import Measurement
from .roots import Columns

Recorded = TypeVar("Recorded", bound="RecordedLayer")

#: Is told the layers that are served, the pulled back pairs and their signs, a few at a time.
Watch = Callable[[Any, dict[int, Tensor], dict[int, Tensor] | None, Tensor | None], None]


@dataclass(eq=False)
class RecordedLayer:
    """A layer with its recorded calls."""

    layer: Layer  #: the layer; it has a rule wherever its calls are used
    inputs: list[tuple[Tensor, ...]] = field(default_factory=list)  #: the input tensors of each call
    leaves: list[Tensor] = field(default_factory=list)  #: for each call the zero leaf ε that was added to its output z
    layouts: list[Layout] = field(default_factory=list)  #: for each call where its samples are
    #: the layouts of which nothing else is to be asked; empty where they are to be found
    settled: list[Layout] = field(default_factory=list)
    with_graph: bool = False  #: whether what is computed from the inputs is to be differentiable

    @property
    def sizes(self) -> list[int]:
        """Elements of one sample's output, by call."""
        return [leaf.numel() // layout.size(leaf) for leaf, layout in zip(self.leaves, self.layouts, strict=True)]

    @property
    def numel(self) -> int:
        """Number of the layer's parameter elements."""
        return sum(self.layer.sizes())

    def gradients(self, cotangents: Sequence[Tensor]) -> dict[str, PerSample]:
        """Per-sample gradients of K stacked cotangents on the layer's calls."""
        rule, inputs, kind = self._calls()
        return stacked_gradients(rule, self.layer.module, inputs, [cast(c, kind) for c in cotangents], self.layouts)

    def gradient(self, cotangents: Sequence[Tensor]) -> dict[str, PerSample]:
        """Those of one cotangent on each call."""
        rule, inputs, kind = self._calls()
        calls = [(call, cast(c, kind)) for call, c in zip(inputs, cotangents, strict=True)]
        return per_sample_gradients(rule, self.layer.module, calls, self.layouts)

    def _calls(self) -> tuple[Rule, list[tuple[Tensor, ...]], torch.dtype]:
        """The layer's rule, the inputs of each call, and the dtype to compute in."""
        assert self.layer.rule is not None
        kind = compute_dtype(self.layer)

        def given(x: Tensor) -> Tensor:
            x = x if self.with_graph else x.detach()
            return cast(x if x.layout is torch.strided else x.to_dense(), kind)

        return self.layer.rule, [tuple(map(given, call)) for call in self.inputs], kind


def layout_options(z: RecordedLayer, num_samples: int) -> list[list[Layout]]:
    """Layouts of all of a layer's calls that its rule accepts, by shape; the usual one first."""
    return [layouts for layouts in _candidates(z, num_samples) if _accepted(z, layouts)]


def _candidates(z: RecordedLayer, num_samples: int) -> list[list[Layout]]:
    if z.settled:
        return [z.settled]
    assert z.layer.rule is not None
    how: Any = {"any_leading_dim": takes_any_leading_dim(z.layer.rule)}
    calls = zip(z.inputs, z.leaves, strict=True)
    by_call = [candidate_layouts(inputs, leaf, num_samples, **how) for inputs, leaf in calls]
    if not all(by_call):
        return []
    return [[call[min(index, len(call) - 1)] for call in by_call] for index in range(max(map(len, by_call)))]


def _accepted(z: RecordedLayer, layouts: list[Layout]) -> bool:
    """Whether a layer's rule accepts layouts: not a shape that it is not for, such as a convolution without a batch."""
    try:
        replace(z, layouts=layouts).gradients([leaf.detach()[None] for leaf in z.leaves])
    except AttributionError:
        return False
    return True


def contract_pairs(
    task: Measurement,
    model_outputs: Sequence[Tensor],
    layers: Sequence[RecordedLayer],
    pairs: Columns,
    *,
    alpha: float = 1.0,
    advance: Callable[[int], None] = lambda _: None,
    plain: Mapping[int, Tensor] | None = None,
    watch: Watch | None = None,
) -> list[list[Tensor] | None]:
    """α Σ_k contract(Jᵀu_k, Jᵀv_k) of every layer at once, by parameter; None for layers without layouts.

    Of one pair alone, ``plain`` is its u pulled back to each leaf, by ``id``, if that was done already.
    """
    leaves, create_graph = [leaf for z in layers for leaf in z.leaves], task.create_graph
    only = pairs.columns(range(1)) if pairs.num_columns == 1 and watch is None else None
    if only is not None and only.v is None and only.sign is None:
        pulled = plain or {k: g[0] for k, g in pull_back(model_outputs, leaves, only.u, create_graph).items()}
        advance(1)
        return [_squares(z, pulled, alpha, create_graph=create_graph) if z.layouts else None for z in layers]
    good = [z for z in layers if z.layouts]
    totals = [zeros(z.layer) if create_graph else parts_of_one(z.layer) for z in good]
    elements = sum(t.numel() for t in (*leaves, *model_outputs))

    def add(ids: range) -> None:  # alone, so that nothing of some columns is left when there are the next
        some = pairs.columns(ids)
        known = {key: g[None] for key, g in (plain or {}).items()} if pairs.num_columns == 1 else None
        u = known or pull_back(model_outputs, leaves, some.u, create_graph)
        v = None if some.v is None else pull_back(model_outputs, leaves, some.v, create_graph)
        if watch is not None:
            watch(good, u, v, some.sign)
        for z, total in zip(good, totals, strict=True):
            left = z.gradients([u[id(leaf)] for leaf in z.leaves])
            right = None if v is None else z.gradients([v[id(leaf)] for leaf in z.leaves])
            for index, (name, p) in enumerate(z.layer.parameters.items()):
                signed = None if some.sign is None else weighted(left[name], some.sign)
                other = signed if right is None else right[name]
                how: Any = {"numel": p.numel(), "alpha": alpha}
                if create_graph:
                    total[index] = total[index] + contract(left[name], other, **how)
                else:
                    contract(left[name], other, out=total[index], beta=float(ids.start > 0), **how)

    size = default_chunk_size(elements, model_outputs[0], task.chunk_size)
    for ids in chunks(pairs.num_columns if good else 0, size):
        add(ids)
        advance(len(ids))
    found = iter(totals)
    return [next(found) if z.layouts else None for z in layers]


def _squares(z: RecordedLayer, plain: Mapping[int, Tensor], alpha: float, *, create_graph: bool) -> list[Tensor]:
    """α Σ_n (J_nᵀ u_n)² of one layer, by parameter, of one u that is pulled back already."""
    found, parameters = z.gradient([plain[id(leaf)] for leaf in z.leaves]), z.layer.parameters.items()
    one = None if create_graph else rank_one(z.layer, found)
    whole = None if one is None else squares_by_onednn(one, alpha)
    if whole is not None:
        return list(whole.split_with_sizes(z.layer.sizes()))
    outs = [None] * len(parameters) if create_graph else parts_of_one(z.layer)
    return [
        contract(found[name], numel=p.numel(), out=out, beta=0.0, alpha=alpha)
        for (name, p), out in zip(parameters, outs, strict=True)
    ]


def parts_of_one(layer: Layer) -> list[Tensor]:
    """A part for each parameter of one vector, with anything in it, which is then the layer's without a copy."""
    sizes = layer.sizes()
    device = next(p.device for p in layer.parameters.values())
    return list(torch.empty(sum(sizes), dtype=compute_dtype(layer), device=device).split_with_sizes(sizes))


def settle(
    task: Measurement,
    model_outputs: Sequence[Tensor],
    layers: Sequence[RecordedLayer],
    pairs: Columns,
    rest: Sequence[RecordedLayer],
) -> dict[int, Tensor]:
    """Enter into every layer where its samples are, or nothing where its rows do not belong to samples.

    Of the ``rest``, which are :func:`unsettled`, it is verified: the vjp of a random mixture of the pairs' u, each
    sample weighted by a random factor, must be the mixture's vjp weighted row by row, to rounding. The first layout for
    which it holds is taken. Returns the u of one pair alone, where it was pulled back to the leaves, by ``id``.
    """
    if not rest:
        return {}
    pulled = settle_layouts(task, model_outputs, rest, pairs.mixture(task.generator))
    whole = len(rest) == len(layers) and pairs.num_columns == 1
    return {key: g[0] for key, g in pulled.items()} if whole else {}


def unsettled(
    task: Measurement, model_outputs: Sequence[Tensor], layers: Sequence[Recorded], *, by_graph: bool
) -> list[Recorded]:
    """Enter layouts that are known without a look at numbers, and return the layers of which they are not.

    With ``by_graph`` the graph is believed, where it tells: no hook of the model's changes gradients.
    """
    if task.certain:
        for z in layers:
            z.layouts = [DIM_ZERO] * len(z.leaves)
        return []
    return layouts_by_graph(model_outputs, layers) if by_graph else list(layers)


def layouts_by_graph(model_outputs: Sequence[Tensor], layers: Sequence[Recorded]) -> list[Recorded]:
    """Enter into every layer the layout that the graph shows to be right; returns those of which it does not tell."""
    count = model_outputs[0].shape[0]
    if count == 1 or not layers:
        return list(layers)
    leaves = [leaf for z in layers for leaf in z.leaves]
    found = samples_in_leaves(samples_in_nodes(model_outputs, count), leaves)
    for z in layers:
        options = (c for c in _candidates(z, count) if _agrees(z, c, found) and _accepted(z, c))
        z.layouts = next(options, [])
    return [z for z in layers if not z.layouts]


def _agrees(z: RecordedLayer, layouts: Sequence[Layout], found: dict[int, int | None]) -> bool:
    """Whether layouts of a layer's calls are where the graph shows the samples to be."""
    return all(
        id(leaf) not in found or (found[id(leaf)] == layout.inner_size(leaf.shape) != SHARED)
        for leaf, layout in zip(z.leaves, layouts, strict=True)
    )


def settle_layouts(
    task: Measurement, model_outputs: Sequence[Tensor], layers: Sequence[RecordedLayer], mixture: Tensor
) -> dict[int, Tensor]:
    """Enter into every layer the first layout under which its rows are found to be samples, or none.

    By a cotangent on the outputs (``mixture``, shape (1, N, C)), which is returned pulled back to the leaves, by
    ``id``.
    """
    leaves = [leaf for z in layers for leaf in z.leaves]
    count = model_outputs[0].shape[0]
    plain = pull_back(model_outputs, leaves, mixture, task.create_graph)
    options = [layout_options(z, count) for z in layers]
    draws = weight_draws(leaves)
    for _ in range(draws):
        weights = sample_weights(count, task.generator, powers=draws > 1).to(mixture)
        scaled = pull_back(model_outputs, leaves, mixture.detach() * weights[:, None], False)
        options = [
            [c for c in choices if _weighted(z.leaves, c, plain, scaled, weights)]
            for z, choices in zip(layers, options, strict=True)
        ]
    for z, choices in zip(layers, options, strict=True):
        z.layouts = next(iter(choices), [])
    return plain


def _weighted(
    leaves: Sequence[Tensor],
    layouts: Sequence[Layout],
    plain: dict[int, Tensor],
    weighted: dict[int, Tensor],
    weights: Tensor,
) -> bool:
    """Whether weighting the samples has weighted their rows in the gradient of every leaf."""
    return all(
        bool(rows_weighted(plain[id(leaf)], weighted[id(leaf)], weights, layout))
        for leaf, layout in zip(leaves, layouts, strict=True)
    )
