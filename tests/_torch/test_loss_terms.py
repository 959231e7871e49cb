"""What the last operations of a loss tell of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder._torch.graph import nodes_behind, tells_recomputation
from secorder._torch.loss_terms import (
    MOST,
    divided_by,
    divisor_of_sum,
    factors_between,
    is_mean,
    mean_over_targets,
    reduced_alone,
    selected,
    terms,
    weighted,
)

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")


@pytest.mark.parametrize(
    ("scaled", "expected"),
    [
        (lambda z: z.square().mean() / 4, [0.25]),
        (lambda z: 0.5 * (z.square().mean() / 4).float(), [0.5, 0.25]),
        (lambda z: z.square().sum() / 6 / 4, [0.25]),
        (lambda z: (z.exp().sum() + z.square().sum()) / 6, []),
        (lambda z: F.mse_loss(z, torch.ones(6), reduction="sum") / 6, []),
        (lambda z: (z / 4).mean(), []),
        (lambda z: z.mean() * z.exp().mean(), []),
    ],
    ids=["divided", "twice", "a mean of a sum", "of two sums", "of a sum of PyTorch's", "elements", "a product"],
)
def test_factors_of_a_loss(scaled: Callable[[Tensor], Tensor], expected: list[float]) -> None:
    z = torch.ones(6, requires_grad=True).clone()
    assert factors_between(scaled(z).grad_fn, [z.grad_fn]) == expected
    whole = z.square().mean() / 4
    assert factors_between((whole / 2).grad_fn, [whole.grad_fn]) == [0.5]


def test_terms_of_a_loss_by_arithmetic_alone() -> None:
    z = torch.ones(3, requires_grad=True)
    loss = -(z.exp().sum() / 3 + z.square().mean() * 2) - z.sum()
    names = [node.name().removesuffix("Backward0") for node in terms(loss.grad_fn)]
    assert names == ["Sub", "Neg", "Sum", "Add", "Div", "Mul", "Sum", "Mean"]
    assert len(list(terms(sum([z.sum() for _ in range(99)]).grad_fn))) <= MOST
    end = loss.grad_fn.next_functions[0][0]
    assert end not in terms(loss.grad_fn, [end])


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda z: z.sum() / 4, (4.0, 6)),
        (lambda z: F.l1_loss(z, torch.zeros(6), reduction="sum") / 5, (5.0, 6)),
        (lambda z: -z.sum() / 4, (4.0, 6)),
        (lambda z: z.sum() / 6 / 4, (0.0, 0)),
        (
            lambda z: (
                (F.mse_loss(z, torch.ones(6), reduction="sum") + F.mse_loss(z[:3], torch.zeros(3), reduction="sum")) / 4
            ),
            (4.0, 3),
        ),
        (lambda z: (z.sum() + z.mean()) / 4, (0.0, 0)),
        (lambda z: z.nansum() / 4, (4.0, 6)),
        (lambda z: z.sum() * 0.25, (0.0, 0)),
        (lambda z: z.mean() / 4, (0.0, 0)),
        (lambda z: 4 / z.sum(), (0.0, 0)),
        (lambda z: z.sum() / z.square().sum(), (0.0, 0)),
    ],
)
def test_what_a_sum_is_divided_by(made: Callable[[Tensor], Tensor], expected: tuple[float, int]) -> None:
    assert divisor_of_sum(made(torch.ones(6, requires_grad=True).exp()).grad_fn) == pytest.approx(expected)


def test_what_is_divided_by_a_number() -> None:
    z = torch.ones(6, requires_grad=True).exp()
    total = z.sum()
    loss = total / 2 / 6
    order = list(nodes_behind([loss.grad_fn]))
    assert divided_by(order, 2) == {total.grad_fn}
    assert divided_by(order, 6) == {loss.grad_fn.next_functions[0][0]}
    assert not divided_by(order, 12)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda z: z.square().sum(), "sum"),
        (lambda z: F.mse_loss(z, torch.ones(6, 2)), "mean"),
        (lambda z: z.abs().sum() - z.sum() / 2, "sum"),
        (lambda z: z.abs().sum() / 6, ""),
        (lambda z: z.abs().sum() / 2 / 3, ""),
        (lambda z: z.abs().sum() - z.mean(), ""),
        (lambda z: (z * torch.rand(6, 1)).sum(), ""),
        (lambda z: z[:4].sum(), ""),
        (lambda z: z.sum(1).mean() * 0, ""),
        (lambda z: z[0].sum(), ""),
    ],
)
def test_how_a_loss_reduces_numbers_of_samples(made: Callable[[Tensor], Tensor], expected: str) -> None:
    z = torch.rand(6, 2, requires_grad=True).exp()
    order = [node for node in nodes_behind([made(z).grad_fn]) if node is not z.grad_fn and node.next_functions]
    assert reduced_alone(order, 6) == expected


def test_what_is_multiplied_by_constants() -> None:
    z, w = torch.rand(6, requires_grad=True).exp(), torch.rand(6)
    assert [weighted(y.grad_fn) for y in (z * w, w * z, z / w, z @ w, w @ z)] == [0, 1, 0, 0, 1]
    assert [weighted(y.grad_fn) for y in (z * z, z + w, w / z, z.sum() * 2)] == [None] * 4


def test_a_mean_over_targets_tells_what_it_counts() -> None:
    z, t, w = torch.randn(4, 3, 2, requires_grad=True), torch.tensor([[0, 1], [2, -1], [0, 0], [-1, 1]]), torch.rand(3)
    (mean,) = [x for x in map(mean_over_targets, nodes(F.cross_entropy(z, t, w, ignore_index=-1))) if x is not None]
    assert torch.equal(mean.ignored.view_as(t), t == -1)
    assert mean.by_class is not None
    assert torch.equal(mean.by_class, w)
    assert mean.classes == 3
    assert not any(map(mean_over_targets, nodes(F.cross_entropy(z, t, reduction="sum", ignore_index=-1))))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda z: z[z[:, 0] > 0], (2, 3)),
        (lambda z: z.masked_select(z > 0), (6,)),
        (lambda z: z.index_select(0, torch.tensor([1, 0, 1])), (3, 3)),
        (lambda z: nn.utils.rnn.pack_padded_sequence(z[..., None], torch.tensor([3, 2]), batch_first=True)[0], (5, 1)),
        (lambda z: z[:1], ()),
    ],
)
def test_the_shape_of_what_is_selected(made: Callable[[Tensor], Tensor], expected: tuple[int, ...]) -> None:
    assert selected(made(torch.ones(2, 3, requires_grad=True).exp()).grad_fn) == expected


def test_what_is_a_mean() -> None:
    z = torch.ones(6, requires_grad=True)
    for loss, expected in ((z.mean(), True), (F.mse_loss(z, torch.zeros(6)), True), (z.sum(), False)):
        assert is_mean(loss.grad_fn) is expected


def nodes(loss: Tensor) -> list[Any]:
    return list(nodes_behind([loss.grad_fn]))
