"""Layers that the loss does not depend on."""

import torch

from secorder.layers.selection import select_layers
from secorder.oneshot.hessian import unused
from secorder.oneshot.hessian.facts import Facts

from ...helpers import make


def test_zeros_of_the_shape_of_each_parameter_where_it_is_not_used() -> None:
    found = unused.run(select_layers(make())[0])
    assert [v.tolist() for v in found] == [[0.0] * 20, [0.0] * 5]
    assert all(v.dtype == torch.float64 for v in found)
    assert unused.applies(Facts("0", 25, used=False))
    assert not unused.applies(Facts("0", 25))
