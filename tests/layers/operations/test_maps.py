"""What leads from a parameter to an operation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secorder._torch.engine import accumulate_node
from secorder._torch.graph import users_of
from secorder.layers.operations import MAPS
from secorder.layers.per_sample import Outer, dense
from secorder.layers.uses import carried

#: Operations that a colon is: none, where PyTorch leaves out what changes nothing.
COLON = len(users_of([torch.zeros(1, 1, requires_grad=True)[:, 0]])) - 2

MAPPED: list[tuple[Callable[[Tensor], Tensor], int]] = [
    (lambda p: p.t(), 1),
    (lambda p: p.transpose(-1, 0), 1),
    (lambda p: p.permute(1, 0).unsqueeze(0), 2),
    (lambda p: p.view(2, 3, 2).permute(2, 0, 1), 2),
    (lambda p: p.view(2, 3, 2).transpose(1, 2), 2),
    (lambda p: p.clone().reshape(-1), 2),
    (lambda p: p[1:], 1),
    (lambda p: p[:, -2:-1], 1 + COLON),
    (lambda p: p[0], 1),
    (lambda p: p[:, -1], 1 + COLON),
    (lambda p: p.split([3, 1], 1)[1] if p.shape[1] == 4 else p.split([4, 2])[1], 1),
    (lambda p: p.chunk(2)[1].t(), 2),
    (lambda p: p.unbind(1)[1], 1),
    (lambda p: 1 + p, 1),
    (lambda p: 0.5 * p, 1),
    (lambda p: p / 4, 1),
    (lambda p: p * torch.tensor([[3.0]]), 1),
    (lambda p: torch.arange(12.0).view(6, 2) * p, 1),
    (lambda p: p / torch.arange(1.0, 7.0)[:, None], 1),
    (lambda p: p * p.detach().norm(), 1),
    (lambda p: p[torch.tensor([[0, 3], [3, -1]])], 1),
    (lambda p: torch.nn.functional.embedding(torch.tensor([[0, 3, 3]]), p, 3), 1),
    # By the backward of what is between: no map is entered for it.
    (lambda p: torch.exp(p), 1),
    (lambda p: torch.full((6, 2), 2.0) / p, 1),
    (lambda p: torch.ones(3, 6, 2) * p, 1),
    (lambda p: p * p.t().reshape(6, 2), 4),
    (lambda p: torch.softmax(p.t(), 0), 2),
    (lambda p: p * p.sum() + p.t().reshape(6, 2), 6),
    (lambda p: p[::2], 1),
]


@pytest.mark.parametrize("index", range(len(MAPPED)))
@pytest.mark.parametrize("factors", [True, False], ids=["factors", "dense"])
def test_carried_to_the_parameter(index: int, factors: bool) -> None:
    function, between = MAPPED[index]
    p = torch.randn(6, 2, requires_grad=True)
    z = function(p)
    matrix = z if z.dim() > 1 else z.unsqueeze(0)
    g = Outer(torch.randn(3, 1, 4, matrix.shape[-1]), torch.randn(3, 1, 4, matrix.numel() // matrix.shape[-1]))
    written = dense(g, z.numel()).reshape(3, *z.shape)
    nodes = users_of([z])
    assert len(nodes) == between + 1
    ((name, found),) = carried(g if factors else written, (z.grad_fn, z.output_nr), {accumulate_node(p): "p"}, nodes)
    expected = torch.autograd.grad(z, p, written, is_grads_batched=True)[0]
    assert name == "p"
    torch.testing.assert_close(dense(found, p.numel()).reshape(3, *p.shape), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_matrices_stay_in_factors(groups: int) -> None:
    p = torch.randn(5, 3, requires_grad=True) if groups == 1 else torch.randn(groups, 5, 3, requires_grad=True)
    z = p.transpose(-1, -2)
    g = Outer(torch.randn(2, groups, 4, 5), torch.randn(2, groups, 4, 3))
    ((_, found),) = carried(g, (z.grad_fn, 0), {accumulate_node(p): "p"}, {})
    assert isinstance(found, Outer)
    assert torch.equal(dense(found, p.numel()).view(2, *p.shape), dense(g, p.numel()).view(2, *z.shape).mT)


def test_names_of_nodes_are_those_of_this_torch() -> None:
    p = torch.randn(4, 2, requires_grad=True)
    made = [f(p).grad_fn.name() for f in (Tensor.t, Tensor.clone, lambda p: p[0], lambda p: p.view(-1))]
    assert set(made) <= MAPS.keys()
