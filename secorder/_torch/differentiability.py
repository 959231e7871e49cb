"""Where the graph of gradients ends although the mathematics goes on, and how it is led on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .graph import nodes_behind


def once_differentiable_functions(gradients: Sequence[Tensor]) -> set[str] | None:
    """The names of functions marked ``once_differentiable`` that cut the graph of these gradients; None where none do.

    Autograd itself would raise when it gets there, or never, where another way leads on. A set without a name means
    that a function cuts the graph that does not tell its name.
    """
    names, cut = set(), False
    for node in nodes_behind(g.grad_fn for g in gradients if g.grad_fn is not None):
        if node.name() == "torch::autograd::Error":
            cut = True
        own = getattr(node, "_forward_cls", None)
        if own is not None and hasattr(own.backward, "__wrapped__"):
            names.add(own.__name__)
    return names if cut else None


def can_be_trained(tensor: Tensor) -> bool:
    """Whether it may require a gradient: not a quantised weight of integers."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def differentiable_zero(model: nn.Module) -> Tensor:
    """A zero that depends on every trainable parameter.

    Added to a diagonal that happens to be constant, it makes its derivative zero rather than an error.
    """
    total = torch.zeros((), device="cpu")
    for parameter in model.parameters():
        if parameter.requires_grad:
            total = total.to(parameter.device) + parameter.flatten()[:1].sum() * 0
    return total
