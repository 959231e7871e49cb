"""What it takes to carry a Hessian backwards through a segment: what is the same however many samples are carried."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import zip_longest

import torch
from torch import Tensor

from ..._torch.chain_graph import Kind, Segment
from ..._torch.vjp import gradients
from .layer_block import by_diagonal_alone
from .layer_graph import LayerGraph

#: A gradient that is computed when it is asked for: of what is piecewise linear, none needs to be.
_Gradient = Callable[[], Tensor]


@dataclass(eq=False)
class Step:
    """A segment with what it takes to carry a Hessian through it."""

    segment: Segment
    gradient: _Gradient  #: makes the loss's in its end, of the tensor's shape
    first: Tensor | None = None  #: φ′ of an elementwise function, shape (N, size)
    second: Tensor | None = None  #: φ″ times the gradient; None for zero
    diagonal: bool = False  #: whether no more than the diagonal is asked for before it
    last: bool = False  #: whether nothing is
    factored: bool = False  #: of a matrix, whether curvature goes through it as factors of each sample's Hessian
    #: the layers inside, or at its end, of which all of H_z is needed, by ``id`` of the leaf
    whole: set[int] = field(default_factory=set)


def steps_of(segments: Sequence[Segment], graphs: Mapping[int, LayerGraph], output_gradient: Tensor) -> list[Step]:
    """Of each segment, from the output backwards, gradients, φ′ and φ″, which are cheap; and what is asked for."""
    gradient: _Gradient = partial(torch.reshape, output_gradient, segments[0].shape)
    steps = []
    for segment, ahead in zip_longest(segments, segments[1:]):
        step = Step(segment, gradient)
        steps.append(step)
        if segment.into is None:
            break
        if segment.kind == Kind.ELEMENTWISE:
            step.first, step.second = _derivatives(segment, gradient, output_gradient)
        known = None if ahead is None else _known_gradient(graphs, ahead)
        gradient = cache(partial(_gradient_before, step)) if known is None else partial(known.reshape, ahead.shape)
    asked = "nothing"
    for step in reversed(steps):
        step.last, step.diagonal = asked == "nothing", asked == "diagonal"
        step.whole = {key for key in step.segment.leaves if not by_diagonal_alone(graphs[key])}
        if asked != "nothing" and step.segment.kind in (Kind.LINEAR, Kind.GENERAL):
            asked = "all"
        if (step.segment.leaves and step.segment.kind == Kind.GENERAL) or step.whole:
            asked = "all"
        elif step.segment.leaves and asked == "nothing":
            asked = "diagonal"
    _choose_form(steps)
    return steps


def _choose_form(steps: Sequence[Step]) -> None:
    """Decide whether Hessians become matrices behind the first curvature, or are kept as factors."""
    matrices, curved = [], False
    for step in steps:
        if step.segment.kind == Kind.GENERAL or step.whole:
            return  # which go by the whole of it
        if step.last:
            break
        curved |= step.second is not None
        if curved and step.segment.kind == Kind.LINEAR:
            matrices.append(step)
    if matrices and factors_pay([step.segment.shape[1] for step in matrices] + [matrices[-1].segment.shape_before[1]]):
        for step in matrices:
            step.factored = True


def factors_pay(sizes: Sequence[int]) -> bool:
    """Whether factors take fewer multiplications than matrices: of few layers.

    By the sizes of one sample before and behind each matrix, from the first one with curvature in its end.
    """
    pairs = list(itertools.pairwise(sizes))
    by_factors = sum(size * a * b for k, size in enumerate(sizes) for a, b in pairs[k + 1 :])
    by_matrix = sum(a * b * (a * (k > 0) + b * (k + 1 < len(pairs))) for k, (a, b) in enumerate(pairs))
    return by_factors < by_matrix


def _known_gradient(graphs: Mapping[int, LayerGraph], segment: Segment) -> Tensor | None:
    """The gradient in a segment's end, where that is a layer's output."""
    leaves = segment.leaves if segment.kind == Kind.SAME else []
    return next((g.detach() for key in leaves for g in graphs[key].output_gradients if g is not None), None)


def _gradient_before(step: Step) -> Tensor:
    """The gradient before a segment, by that in its end."""
    segment, gradient = step.segment, step.gradient()
    if segment.kind == Kind.SAME:
        return gradient.reshape(segment.shape_before)
    if segment.weight is not None:
        return gradient @ segment.weight.t()
    if step.first is not None:
        return step.first.view_as(gradient) * gradient
    assert segment.into is not None
    (found,) = gradients([segment.out], [segment.into], [gradient])
    return gradient.new_zeros(segment.shape_before) if found is None else found


def _derivatives(segment: Segment, gradient: _Gradient, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """φ′ and φ″ times the gradient, as autograd has them, in shape (N, size); None for a φ″ of zero."""
    assert segment.into is not None
    ones, curved = like.new_ones(()).expand(segment.shape), not segment.piecewise_linear
    (first,) = gradients([segment.out], [segment.into], [ones], create_graph=curved)
    if first is None:
        return like.new_zeros(segment.shape).flatten(1), None
    second = gradients(first, [segment.into], [gradient()])[0] if curved else None
    count = len(first)
    flat = None if second is None or not bool(second.any()) else second.reshape(count, -1)
    return first.detach().reshape(count, -1), flat
