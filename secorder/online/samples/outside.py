"""Layers whose own calls are not enough: parameters used elsewhere, or no gradient on the output."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

from torch import nn

from ..._torch.engine import accumulate_node
from ..._torch.graph import Users
from ..._torch.own_hooks import outputs_seen
from ..._torch.pytree import tensors_in
from ...layers.selection import Layer
from ...oneshot.isolation import IsolatedModel, isolate


def without_gradient(model: nn.Module, layers: Sequence[Layer], arguments: Any) -> set[str]:
    """Frozen layers whose output carries no gradient in the model as it is, or that it does not even call."""
    frozen = [x for x in layers if not any(p.requires_grad for p in x.parameters.values())]
    if not frozen:
        return set()
    missing = {layer.name for layer in frozen}

    def see(name: str, output: Any) -> None:
        if any(t.requires_grad for t in tensors_in(output)):
            missing.discard(name)

    with isolate(model, None, []) as isolated, outputs_seen([(x.name, x.enclosing) for x in frozen], see):
        isolated.run(lambda copied: model(*copied[0], **copied[1]), arguments)
    return missing


def uses_outside(isolated: IsolatedModel, layers: Sequence[Layer], users: Users) -> set[str]:
    """Layers whose parameters the output depends on other than through their calls."""
    outside: set[str] = set()
    for one, other in permutations(layers, 2):  # tied weights: each layer's calls are another's outside
        together = one.rule is not None and other.rule is not None  # see tied_layers
        held = any(m is other.enclosing for m in one.enclosing.modules())
        if not together and not held and share_parameters(one, other):
            outside.add(one.name)
    inside = [x for x in layers if x.enclosing is not isolated.model]
    return outside | {x.name for x in inside if any(accumulate_node(s) in users for s in isolated.replacements(x))}


def share_parameters(one: Layer, other: Layer) -> bool:
    """Whether two layers hold one and the same parameter."""
    return not {id(p) for p in one.parameters.values()}.isdisjoint(id(p) for p in other.parameters.values())
