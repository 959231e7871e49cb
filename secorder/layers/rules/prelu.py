"""Activations with a learnable slope."""

from torch import Tensor, nn

from ..per_sample import PerSample
from .registry import rule_of


@rule_of(nn.PReLU, parameters=("weight",))
def prelu(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = max(0, x) + w ⊙ min(0, x), w one number or one a channel."""
    assert isinstance(module, nn.PReLU)
    products = inputs[0].clamp(max=0) * g
    if module.num_parameters == 1:
        return {"weight": products.flatten(1).sum(1, keepdim=True)}
    rest = list(range(2, products.dim()))
    return {"weight": products.sum(rest) if rest else products}
