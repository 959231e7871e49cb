"""Whether gradients of layers are in proportion to those on the outputs, as those of a mean over samples are.

They are, unless a hook or a custom function on the way clamps or normalises them, or chooses among those of samples.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..._torch.graph import is_builtin, least_precise
from ..._torch.random_state import fresh_generator
from ..._torch.vjp import gradients
from ...errors import DoubleBackwardError
from ...layers.dtypes import rounding
from ...oneshot.cotangents import ALIKE
from ...oneshot.independence import over_samples
from ...oneshot.use_rows import ByCotangents
from .forward_graph import ForwardGraph

NOT_LINEAR = (
    "gradients do not come back to it in proportion to those on the model's outputs (a hook or a custom "
    "autograd.Function clamps or normalises them, or chooses among those of samples), so that those of a batch do not "
    "tell what a sample's own would be: remove it, leave the layer out with layers=, or measure it with one-shot calls."
)


def not_linear(graph: ForwardGraph, ends: Mapping[str, Sequence[Tensor]]) -> frozenset[str]:
    """The layers whose gradients are not in proportion, by those at their ends: parameters, or leaves on outputs."""
    if not (ends and graph.ends) or not (graph.hooked or not all(map(is_builtin, graph.users))):
        return frozenset()
    outputs, flat = [f for f, _ in graph.ends], [end for own in ends.values() for end in own]
    try:
        whole, part, rest = (gradients(outputs, flat, cotangents) for cotangents in _parts(graph))
    except DoubleBackwardError:  # reentrant checkpoints do not go with torch.autograd.grad
        return frozenset()
    bound = rounding(least_precise(outputs))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for end, g, *halves in zip(flat, whole, part, rest, strict=True):
        if g is not None:
            a, b = (torch.zeros_like(g) if half is None else half for half in halves)
            found[id(end)] = g, (b - ALIKE * (g - a)).abs()
    # What cancels, as of a shift before a normalisation, leaves rounding of what it is made of.
    least = 16 * torch.finfo(least_precise(outputs)).eps * ALIKE * _largest([g for g, _ in found.values()])
    bent = set()
    for name, own in ends.items():
        reached = [found[id(end)] for end in own if id(end) in found]
        passes = max(bound * ALIKE * _largest([g for g, _ in reached]), least)
        if any(bool((g.isfinite() & ~(error <= passes)).any()) for g, error in reached):
            bent.add(name)
    return frozenset(bent)


def _largest(gradients: Iterable[Tensor]) -> float:
    return max((float(g.abs().amax()) for g in gradients if g.numel()), default=0.0)


def _parts(graph: ForwardGraph) -> Iterator[list[Tensor]]:
    """Random cotangents on the outputs; those of some of the samples alone; those of the others, multiplied."""
    generator = fresh_generator(graph.ends[0][0].device)
    cotangents = ByCotangents(graph.ends, graph.count, generator).plain
    some = torch.randperm(graph.count, generator=generator, device=generator.device) < graph.count // 2
    yield cotangents
    for scale, chosen in ((1.0, some), (ALIKE, ~some)):
        pairs = zip(cotangents, graph.ends, strict=True)
        yield [c * over_samples(scale * chosen[None].to(c), c, layout)[0] for c, (_, layout) in pairs]
