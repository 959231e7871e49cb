"""Whether gradients of layers are in proportion to those on the outputs, as those of a mean over samples are.

They are, unless a hook or a custom function on the way clamps or normalises them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..._torch.graph import is_builtin, least_precise
from ..._torch.random_state import fresh_generator
from ..._torch.vjp import gradients
from ...errors import DoubleBackwardError
from ...layers.dtypes import rounding
from ...oneshot.cotangents import ALIKE
from .forward_graph import ForwardGraph

NOT_LINEAR = (
    "gradients do not come back to it in proportion to those on the model's outputs (a hook or a custom "
    "autograd.Function clamps or normalises them), so that those of a batch do not tell what a sample's own would be: "
    "remove it, leave the layer out with layers=, or measure it with a one-shot call."
)


def not_linear(graph: ForwardGraph, ends: Mapping[str, Sequence[Tensor]]) -> frozenset[str]:
    """The layers whose gradients are not in proportion, by those at their ends: parameters, or leaves on outputs.

    Layers whose calls tell of their samples have been tried at their outputs, and are not asked about.
    """
    if not (ends and graph.ends) or not (graph.hooked or not all(map(is_builtin, graph.users))):
        return frozenset()
    outputs, flat = [f for f, _ in graph.ends], [end for own in ends.values() for end in own]
    generator = fresh_generator(outputs[0].device)
    cotangents = [
        torch.randn(f.shape, generator=generator, dtype=torch.float32, device=generator.device).to(f) for f in outputs
    ]
    try:
        once, more = (gradients(outputs, flat, [number * c for c in cotangents]) for number in (1.0, ALIKE))
    except DoubleBackwardError:  # reentrant checkpoints do not go with torch.autograd.grad
        return frozenset()
    bound = rounding(least_precise(outputs))
    pairs = {id(end): (g, u) for end, g, u in zip(flat, once, more, strict=True) if g is not None and u is not None}
    found = set()
    for name, own in ends.items():
        reached = [pairs[id(end)] for end in own if id(end) in pairs]
        size = max((float(g.abs().amax()) for g, _ in reached if g.numel()), default=0.0)
        if any(bool(((u - ALIKE * g).abs() > bound * ALIKE * size).any()) for g, u in reached):
            found.add(name)
    return frozenset(found)
