"""Products of many vectors at once, against one at a time."""

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from secorder import DoubleBackwardError, InvalidArgumentError
from secorder.products import check_chunk_size, chunks, default_chunk_size, gradients, stacked_vjp


class NoBatching(torch.autograd.Function):
    """x² with a backward that vmap cannot run."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x**2

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * g if g.sum().item() > -1e9 else g


class Once(NoBatching):
    """The same, not to be differentiated twice."""

    backward = staticmethod(once_differentiable(NoBatching.backward))


@pytest.mark.parametrize("square", [lambda x: x**2, NoBatching.apply])
def test_stacked_against_single_products(square: object) -> None:
    x, y, unused = (torch.randn(3, requires_grad=True) for _ in range(3))
    outputs = [square(x) * y, torch.sin(y), None, torch.zeros(2)]  # type: ignore[operator]
    cotangents = [torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 1), torch.randn(4, 2)]
    found = stacked_vjp(outputs, [x, y, unused], cotangents)
    for k in range(4):
        single = torch.autograd.grad(outputs[:2], [x, y], [c[k] for c in cotangents[:2]], retain_graph=True)
        torch.testing.assert_close((found[0][k], found[1][k]), single)
    assert torch.equal(found[2], torch.zeros(4, 3))


def test_nothing_to_differentiate() -> None:
    assert torch.equal(stacked_vjp([torch.ones(2)], [torch.ones(3)], [torch.ones(5, 2)])[0], torch.zeros(5, 3))
    assert gradients(torch.ones(()), []) == []


def test_a_function_without_a_second_derivative_is_named() -> None:
    x = torch.randn(3, requires_grad=True)
    assert gradients(Once.apply(x).sum(), [x])[0] is not None
    with pytest.raises(DoubleBackwardError, match="marked once_differentiable"):
        gradients((Once.apply(x) ** 2).sum(), [x], create_graph=True)


def test_chunks() -> None:
    assert [list(c) for c in chunks(5, 2)] == [[0, 1], [2, 3], [4]]
    assert default_chunk_size(10, torch.zeros(1), 3) == 3
    assert default_chunk_size(1 << 60, torch.zeros(1), None) == 1
    with pytest.raises(InvalidArgumentError, match="chunk_size"):
        check_chunk_size(0)
