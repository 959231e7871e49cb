"""A part of the graph, differentiated node by node."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.graph import tells_recomputation
from secorder._torch.loss_graph import UnknownNode, elements_of, nodes_between, place_of, pull_back

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda z: F.cross_entropy(z.view(-1, 3), torch.tensor([0, 1, 2, 0, 1, 2])),
    "contrastive": lambda z: F.cross_entropy(z @ z.T, torch.arange(len(z))),
    "broadcast": lambda z: ((z[:, None] - z) ** 2 * torch.arange(6.0)).mean(),
    "twice": lambda z: z.exp().sum() * z.square().mean(),
    "in place": lambda z: z.clone().mul_(2).clamp_(-1, 1).tanh().sum(),
    "chunks": lambda z: (lambda a, b: (a * b.sigmoid()).sum())(*z.chunk(2, 1)),
    "mixed dtypes": lambda z: z.float().square().sum() + z.sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_what_autograd_computes_without_a_hook(name: str) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    z = x.tanh()
    calls: list[int] = []
    z.register_hook(lambda _: calls.append(1))
    loss = LOSSES[name](z)
    loss.register_hook(lambda _: calls.append(2))
    end, root = place_of(z), place_of(loss)
    with torch.enable_grad():
        (slope,) = pull_back({root: torch.ones_like(loss)}, [end]).values()
    v = torch.randn(3, 6)
    total = (slope * v).sum()
    with torch.no_grad():
        (product,) = pull_back({place_of(total): torch.ones_like(total)}, [end]).values()
    assert not calls
    assert x.grad is None
    (expected,) = torch.autograd.grad(loss, z, create_graph=True)
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(product, torch.autograd.grad((expected * v).sum(), z)[0])


def test_what_does_not_lead_there_is_left_out() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    z = x.tanh()
    loss = (z * w.exp()).sum() + w.square().sum()
    order = nodes_between([loss.grad_fn], [z.grad_fn])
    assert [node.name() for node in order] == ["AddBackward0", "SumBackward0", "MulBackward0"]
    assert elements_of(order) == 5
    assert nodes_between([loss.grad_fn], [x.sin().grad_fn]) == []


def test_a_custom_function_is_not_run() -> None:
    class Exponential(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            pytest.fail("run")

    z = torch.randn(3, requires_grad=True).tanh()
    loss = Exponential.apply(z).sum()
    with pytest.raises(UnknownNode, match="Exponential"):
        pull_back({place_of(loss): torch.ones_like(loss)}, [place_of(z)])
