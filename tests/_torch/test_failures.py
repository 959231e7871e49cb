"""What a ``RuntimeError`` that came out of PyTorch means."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder._torch.failures import is_missing_graph, is_out_of_memory, is_users_own, is_vmap_failure


def raised(function: Callable[[], Any]) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        function()
    return caught.value


def test_too_little_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(raised(lambda: torch.empty(1 << 55)))
    assert not is_out_of_memory(raised(lambda: torch.ones(2) @ torch.ones(3)))


def users_own(g: Tensor) -> Tensor:
    raise RuntimeError("of the user's")


@pytest.mark.parametrize(
    ("backward", "expected"),
    [
        (lambda g: g * g.sum().item(), True),
        (lambda g: g if g.sum() > 0 else -g, True),
        (lambda g: torch.from_numpy(g.numpy()), True),
        (lambda g: torch.tensor(g.tolist()), True),
        (lambda g: g if g.data_ptr() else -g, True),
        (lambda g: torch.zeros(3).add_(g), True),
        (lambda g: g[g > 0].sum() * g, True),
        (lambda g: torch.rand_like(g), True),
        (torch.nn.functional.dropout, True),
        (users_own, False),
    ],
)
def test_what_vmap_cannot_run(backward: Callable[[Tensor], Tensor], expected: bool) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return backward(g)

    x = torch.ones(3, requires_grad=True)
    y = Double.apply(x)  # type: ignore[no-untyped-call]
    error = raised(lambda: torch.autograd.grad(y, x, torch.ones(2, 3), is_grads_batched=True, retain_graph=True))
    assert is_vmap_failure(error) is expected
    assert is_vmap_failure(raised(lambda: torch.vmap(backward)(torch.ones(2, 3, requires_grad=True)))) is expected


def test_a_derivative_of_what_is_not_of_the_graph() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    assert is_missing_graph(raised(lambda: torch.autograd.grad(x.sum(), y)))
    assert is_missing_graph(raised(lambda: torch.autograd.grad(x.detach().sum(), x)))
    assert is_missing_graph(raised(lambda: torch.autograd.grad(x.sum(), y.detach())))
    assert is_missing_graph(raised(lambda: x.detach().sum().backward()))
    assert not is_missing_graph(raised(lambda: x @ torch.ones(2)))


def test_whose_code_raised() -> None:
    assert is_users_own(raised(lambda: users_own(torch.ones(1))))
    assert not is_users_own(raised(lambda: torch.ones(2) @ torch.ones(3)))
    assert not is_users_own(raised(lambda: torch.autograd.grad(torch.ones(()), torch.ones(()))))
