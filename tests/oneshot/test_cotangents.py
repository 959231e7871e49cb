"""Cotangents pulled back, and backward passes that are not linear in them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError
from secorder.oneshot.cotangents import pull_back, require_linear_backward
from secorder.oneshot.roots import Single

from ..helpers import seeded


def test_cotangents_are_pulled_back_to_every_leaf() -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    stack = torch.randn(5, 4, 2)
    found = pull_back([x @ w], [x, w], stack, False)
    assert torch.allclose(found[id(x)], stack @ w.T)
    assert torch.allclose(found[id(w)], x.T @ stack)


def test_a_gradient_that_is_all_rounding_tells_nothing() -> None:
    layer, x = nn.Linear(3, 4), torch.randn(6, 3)
    f = torch.tanh(F.layer_norm(layer(x)[..., None].expand(-1, -1, 7).sin().cumsum(1) * 1e3, [4, 7]))
    free = layer.bias.new_zeros(6, 1, 1, requires_grad=True)  # which the normalisation takes off again
    g = F.layer_norm(layer(x)[..., None] + free, [4, 1]).tanh().squeeze(2)
    for outputs, ends in (([g], [layer.weight, free]), ([f.flatten(1)], [layer.weight])):
        require_linear_backward(outputs, ends, Single(torch.randn(6, outputs[0].shape[1])), seeded())


def test_a_backward_that_clamps_has_no_jacobian() -> None:
    def clamps(h: Tensor) -> Tensor:
        h = h * 1
        h.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return h

    for function, linear in ((torch.tanh, True), (clamps, False)):
        x = torch.randn(6, 3, requires_grad=True)
        pair = Single(torch.randn(6, 3))
        if linear:
            require_linear_backward([function(x)], [x], pair, seeded())
        else:
            with pytest.raises(AttributionError, match="not linear"):
                require_linear_backward([function(x)], [x], pair, seeded())


@pytest.mark.parametrize("seed", range(8))
def test_what_nearly_cancels_is_rounded_more_and_is_linear(seed: int) -> None:
    """A normalisation of two elements, and another behind it, leave of a gradient what is far below it."""
    torch.manual_seed(seed)
    first, second = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    x = torch.randn(6, 3).double()
    free = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    f = F.layer_norm(second(F.layer_norm(F.elu(first(x)) + free, [2])), [2])
    require_linear_backward([f], [free], Single(torch.randn(6, 2).double()), seeded())
