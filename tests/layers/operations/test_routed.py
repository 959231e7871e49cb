"""Rows that are put back into their places, against one backward a sample."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.engine import accumulate_node
from secorder._torch.graph import users_of
from secorder.layers.layout import DIM_ZERO, Layout
from secorder.layers.operations import OperationCall, per_sample_gradient
from secorder.layers.operations.routed import OwnedRows, put_back
from secorder.layers.per_sample import Outer, dense
from secorder.layers.uses import carried, pieces

N, T, WIDTH = 3, 4, 5
#: Places that one sample, some, or none have a part in, one of them twice.
IDS = torch.tensor([7, 0, 5, 4, 1, 5])
Parameters = dict[str, Tensor]


def mlp(rows: Tensor, p: Parameters) -> Tensor:
    """A linear layer without a bias, halves that are multiplied, and one with a bias, weighed by its input."""
    one, other = F.linear(rows, p["up"]).chunk(2, -1)
    return F.linear(F.silu(one) * other.tanh(), p["down"], p["bias"]) * rows


def normed(rows: Tensor, p: Parameters) -> Tensor:
    """Rows that an operation mixes of which nothing is known, and one parameter for all elements of a row."""
    return F.linear((rows @ p["down"].t()[:WIDTH]).softmax(0) * p["bias"], p["down"][:, :WIDTH])


def added(whole: Tensor, rows: Tensor) -> Tensor:
    return whole.index_add(0, IDS, rows, alpha=2)


def put(whole: Tensor, rows: Tensor) -> Tensor:
    return whole.index_put((IDS - N * T,), rows, accumulate=True)


def masked(whole: Tensor, rows: Tensor) -> Tensor:
    here = torch.zeros(N * T, dtype=torch.bool)
    here[[0, 1, 4, 5, 7, 9]] = True
    return whole.index_put((here,), rows)


@pytest.mark.parametrize("layout", [Layout(0, T), Layout(0, T, False)])
@pytest.mark.parametrize("back", [added, put, masked])
@pytest.mark.parametrize("expert", [mlp, normed])
def test_rows_that_an_expert_saw(
    expert: Callable[[Tensor, Parameters], Tensor], back: Callable[[Tensor, Tensor], Tensor], layout: Layout
) -> None:
    shapes = {"up": (2 * WIDTH, WIDTH), "down": (WIDTH, WIDTH), "bias": (WIDTH,)}
    parameters = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    z = back(torch.randn(N * T, WIDTH), expert(torch.randn(N * T, WIDTH)[IDS], parameters))
    g = torch.randn_like(z)
    leaves = {accumulate_node(p): name for name, p in parameters.items()}
    call = OperationCall(z.grad_fn, [g], [layout], N, g.dtype)
    rows = per_sample_gradient(call, 1)
    assert isinstance(rows, OwnedRows)
    found = pieces([list(carried(rows, z.grad_fn.next_functions[1], leaves, users_of([z])))])
    used = ["up", "down", "bias"] if expert is mlp else ["down", "bias"]
    assert found.keys() == set(used)
    if expert is mlp:
        assert isinstance(found["up"][0], Outer)
        assert found["up"][0].g.shape[2] < len(IDS)
    for n in range(N):
        alone = torch.zeros_like(layout.split(g))
        alone[n] = layout.split(g)[n]
        expected = torch.autograd.grad(z, [parameters[k] for k in used], layout.join(alone), retain_graph=True)
        for name, own in zip(used, expected, strict=True):
            got = sum(dense(part, own.numel())[n] for part in found[name])
            torch.testing.assert_close(got, own.flatten(), rtol=1e-10, atol=1e-12)


def test_an_expert_without_rows() -> None:
    weight = torch.randn(2, WIDTH, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    z = torch.randn(N, 2).index_add(0, none, F.linear(torch.randn(0, WIDTH), weight))
    rows = per_sample_gradient(OperationCall(z.grad_fn, [torch.ones(N, 2)], [DIM_ZERO], N, z.dtype), 1)
    leaves = {accumulate_node(weight): "weight"}
    (found,) = pieces([list(carried(rows, z.grad_fn.next_functions[1], leaves, users_of([z])))])["weight"]
    assert not dense(found, weight.numel()).any()


def test_what_is_put_elsewhere_is_left_to_the_operation() -> None:
    rows = torch.randn(N * T, 2, requires_grad=True)
    z = torch.randn(N * T, WIDTH).index_add(1, torch.tensor([0, 3]), rows * 1)
    call = OperationCall(z.grad_fn, [torch.ones_like(z)], [Layout(0, T)], N, z.dtype)
    assert not isinstance(per_sample_gradient(call, 1), OwnedRows)


def test_an_operation_whose_first_output_is_not_used() -> None:
    node = torch.linalg.qr(torch.randn(N, T, requires_grad=True))[1].grad_fn
    assert node is not None
    call = OperationCall(node, [None, torch.randn(N, T)], [DIM_ZERO, DIM_ZERO], N, torch.float64)
    assert put_back(call, 1) is None
