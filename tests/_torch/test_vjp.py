"""Products of many vectors at once, against one at a time."""

from math import inf

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from secorder import DoubleBackwardError, InvalidArgumentError
from secorder._torch import vjp
from secorder._torch.vjp import (
    check_chunk_size,
    chunks,
    default_chunk_size,
    gradients,
    products_at_once,
    split_like,
    stacked_vjp,
)


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


def test_zeros_without_memory_may_be_written_to() -> None:
    x = torch.randn(3, requires_grad=True)
    (signs,) = gradients(x.abs().sum(), [x], create_graph=True)
    assert signs is not None
    products = [gradients(signs.sum(), [x])[0], *(stacked_vjp([signs], [x], [torch.ones(k, 3)])[0] for k in (1, 2))]
    assert all(torch.equal(zeros.add_(1), torch.ones(zeros.shape)) for zeros in products if zeros is not None)


def test_a_function_without_a_second_derivative_is_named() -> None:
    x = torch.randn(3, requires_grad=True)
    assert gradients(Once.apply(x).sum(), [x])[0] is not None
    with pytest.raises(DoubleBackwardError, match="marked once_differentiable"):
        gradients((Once.apply(x) ** 2).sum(), [x], create_graph=True)


def test_chunks() -> None:
    assert [list(c) for c in chunks(5, 2)] == [[0, 1], [2, 3], [4]]
    assert default_chunk_size(10, torch.zeros(1), 3) == 3
    assert default_chunk_size(1 << 60, torch.zeros(1), None) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vjp, "free_memory", lambda device: 8 * 4 * 4 * 100 * 7)
        assert default_chunk_size(100, torch.zeros(1, dtype=torch.float32), None) == 7
    with pytest.raises(InvalidArgumentError, match="chunk_size"):
        check_chunk_size(0)


def test_long_products_are_made_alone_on_a_cpu() -> None:
    like = torch.zeros(1, dtype=torch.float32)
    assert products_at_once((1 << 17) - 1, like, None, inf) == default_chunk_size((1 << 17) - 1, like, None) > 1
    assert (
        products_at_once(1 << 17, like, None, 1 << 13) == products_at_once(1 << 16, like.double(), None, 1 << 12) == 1
    )
    assert products_at_once(1 << 17, like, 3, inf) == 3
    elsewhere = torch.zeros(1, device="meta")
    assert products_at_once(1 << 17, elsewhere, None, inf) == default_chunk_size(1 << 17, elsewhere, None)


def test_products_through_many_short_operations_are_made_together() -> None:
    like = torch.zeros(1, dtype=torch.float32)
    assert products_at_once(1 << 17, like, None, (1 << 13) - 1) == default_chunk_size(1 << 17, like, None) > 1


class Broken(NoBatching):
    """The same, with a fault of the user's own in its backward."""

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        raise RuntimeError("of the user's own")


def test_faults_of_the_users_own_are_raised_as_they_are() -> None:
    x = torch.randn(3, requires_grad=True)
    y = Broken.apply(x)
    for count in (1, 4):
        with pytest.raises(RuntimeError, match="of the user's own") as caught:
            stacked_vjp([y], [x], [torch.ones(count, 3)])
        assert type(caught.value) is RuntimeError


def test_fewer_products_at_once_where_memory_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, requires_grad=True)
    y, cotangents, sizes = x**2, torch.randn(5, 3), []
    actual = torch.autograd.grad

    def grad(outputs: object, inputs: object, cotangents: list[Tensor], **options: bool) -> object:
        count = len(cotangents[0]) if options.get("is_grads_batched") else 1
        sizes.append(count)
        if count > fitting:
            raise torch.OutOfMemoryError("out of memory")
        return actual(outputs, inputs, cotangents, **options)  # type: ignore[arg-type]

    expected = stacked_vjp([y], [x], [cotangents])[0]
    monkeypatch.setattr(torch.autograd, "grad", grad)
    fitting = 2
    torch.testing.assert_close(stacked_vjp([y], [x], [cotangents])[0], expected)
    assert sizes == [5, 2, 3, 1, 2]
    fitting = 0
    with pytest.raises(torch.OutOfMemoryError):
        stacked_vjp([y], [x], [cotangents])


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_to_differentiate_by_gives_nothing(count: int) -> None:
    x = torch.randn(3, requires_grad=True)
    assert stacked_vjp([x.sin()], [], [torch.ones(count, 3)]) == []


def test_stacked_vectors_are_split_by_all_elements_or_by_those_of_each_sample() -> None:
    tensors = [torch.zeros(2, 3), torch.zeros(2, dtype=torch.float16)]
    stack = torch.arange(16.0).view(2, 8)
    first, second = split_like(stack, tensors)
    assert torch.equal(first, stack[:, :6].view(2, 2, 3))
    assert torch.equal(second, stack[:, 6:].half())
    first, second = split_like(stack.view(2, 2, 4), tensors)
    assert torch.equal(first, stack.view(2, 2, 4)[..., :3])
    assert torch.equal(second, stack.view(2, 2, 4)[..., 3].half())
