"""Where the graph of gradients ends although the mathematics goes on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secorder._torch.differentiability import can_be_trained, differentiable_zero, once_differentiable_functions


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Once(Square):
    backward = staticmethod(once_differentiable(Square.backward))


def test_a_function_that_cuts_the_graph_of_gradients_is_named() -> None:
    x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    for function, names in [(Square, None), (Once, {"Once"})]:
        y = (w * function.apply(x)).sum()  # type: ignore[no-untyped-call]
        assert once_differentiable_functions([y]) is None
        assert once_differentiable_functions(torch.autograd.grad(y, [x, w], create_graph=True)) == names
    assert once_differentiable_functions([torch.ones(2)]) is None


def test_one_that_the_graph_does_not_tell_the_name_of_is_found() -> None:
    x = torch.ones(3, requires_grad=True)
    y = Once.apply(x).exp().sum()  # type: ignore[no-untyped-call]
    assert once_differentiable_functions(torch.autograd.grad(y, [x], create_graph=True)) == set()


def test_a_zero_has_a_graph_to_all_that_is_trained() -> None:
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    zero = differentiable_zero(model)
    assert zero == 0
    (found,) = torch.autograd.grad(zero, [model.weight])
    assert not found.any()


def test_integers_have_no_gradient() -> None:
    kinds = [torch.float32, torch.bfloat16, torch.complex64, torch.int8, torch.uint8, torch.bool]
    assert [can_be_trained(torch.zeros(1, dtype=kind)) for kind in kinds] == [True] * 3 + [False] * 3
