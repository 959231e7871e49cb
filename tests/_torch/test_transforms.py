"""Transforms of ``torch.func``."""

import torch
from torch import Tensor

from secorder._torch.transforms import inside_transform


def test_transforms_are_seen_from_inside() -> None:
    found: list[bool] = []

    def function(x: Tensor) -> Tensor:
        found.append(bool(inside_transform()))
        return x.sum()

    x = torch.ones(3)
    function(x)
    torch.func.vmap(function)(x)
    torch.func.grad(function)(x)
    torch.func.jvp(function, (x,), (x,))
    assert found == [False, True, True, True]
    assert not inside_transform()
