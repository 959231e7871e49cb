"""What the last operations of a loss tell of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder._torch.graph import nodes_behind, tells_recomputation
from secorder._torch.loss_terms import (
    MOST,
    alone,
    averaged,
    divides_by_tensor,
    factors_between,
    hides,
    is_mean,
    mean_over_targets,
    multiplier,
    ones_for,
    selected,
    summed,
    terms,
    uniform,
    weights_within,
)

from ..helpers import Doubled, Exponential

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
        (lambda z: z.sum(), 6),
        (lambda z: z.nansum(), 6),
        (lambda z: F.l1_loss(z, torch.zeros(6), reduction="sum"), 6),
        (lambda z: F.mse_loss(z, torch.zeros(6), reduction="sum"), 6),
        (lambda z: F.nll_loss(z.view(2, 3), torch.tensor([0, 2]), reduction="sum"), 2),
        (lambda z: z.view(2, 3).sum(1), 0),
        (lambda z: z.mean(), 0),
    ],
)
def test_how_many_are_added_up(made: Callable[[Tensor], Tensor], expected: int) -> None:
    assert summed(made(torch.ones(6, requires_grad=True).exp()).grad_fn) == expected


def test_how_many_one_is_the_mean_of() -> None:
    z = torch.randn(4, 3, requires_grad=True).exp()
    made = [z.mean(), z.mean(1), z.sum(0), F.mse_loss(z, 0 * z), F.nll_loss(z, torch.tensor([0, 1, 2, 0]))]
    assert [averaged(y.grad_fn) for y in made] == [12, 3, 0, 12, 4]


def test_what_is_multiplied_by_constants() -> None:
    z, w = torch.rand(6, requires_grad=True).exp(), torch.rand(6)
    leads = [z.grad_fn]
    for y, index, expected in (
        (z * w, 0, w),
        (w * z, 1, w),
        (z / w, 0, 1 / w),
        (z @ w, 0, w),
        (w @ z, 1, w),
        (3 * z, 0, torch.full((6,), 3.0)),
    ):
        by = multiplier(y.grad_fn, index, leads)
        assert by is not None
        torch.testing.assert_close(by, expected)
    assert [multiplier(y.grad_fn, i, leads) for y, i in ((z * z, 0), (z + w, 0), (w / z, 1))] == [None] * 3
    learnt = torch.tensor(2.0, requires_grad=True).exp()
    by = multiplier((z * learnt).grad_fn, 0, leads)
    assert by is not None
    assert uniform(by)
    assert multiplier((z * learnt).grad_fn, 0, [*leads, learnt.grad_fn]) is None


def test_an_operation_is_linear_where_its_gradient_does_not_depend_on_what_it_is_given() -> None:
    z = torch.rand(6, dtype=torch.float64, requires_grad=True).exp()
    kernel = torch.full((1, 1, 6), 0.5, dtype=torch.float64)
    variance, mean = torch.var_mean(z)
    for y, number, expected in (
        (F.conv1d(z[None, None], kernel), 0, 0.5),
        (F.avg_pool2d(z[None, None], (1, 6)), 0, 1 / 6),
        (z.norm(1), 0, 1.0),
        (mean, 1, 1 / 6),
        (variance, 0, None),
        (z.exp().prod(), 0, None),
        (z.norm(2), 0, None),
    ):
        node = y.grad_fn
        by = multiplier(node, 0, [node.next_functions[0][0]], 6, number)
        assert (by is None) == (expected is None), node
        if by is not None:
            torch.testing.assert_close(by, torch.full_like(by, expected))


def test_a_number_is_divided_by_as_it_is_in_half_precision() -> None:
    total = torch.ones(12, dtype=torch.bfloat16, requires_grad=True).exp().sum()
    by = multiplier((total / 12).grad_fn, 0, [total.grad_fn])
    assert by is not None
    assert float(by) == pytest.approx(1 / 12, rel=1e-6)


def test_numbers_that_are_the_same_to_rounding() -> None:
    assert uniform(torch.full((5,), 1 / 3))
    assert uniform(torch.tensor([1.0, 1.0 + 1e-7], dtype=torch.float32))
    assert not uniform(torch.tensor([1.0, 1.0 + 1e-5]))
    assert not uniform(torch.tensor([1.0, -1.0]))


def test_what_does_not_tell_what_it_does() -> None:
    z = torch.ones(3, requires_grad=True).exp()
    assert hides(Exponential.apply(z).grad_fn)
    assert hides(Doubled.apply(z).grad_fn)
    assert hides(checkpoint(torch.square, z, use_reentrant=False).grad_fn)
    assert not hides(z.square().grad_fn)


def test_weights_of_a_binary_cross_entropy() -> None:
    z, w = torch.rand(4, 2, requires_grad=True).sigmoid(), torch.rand(4, 1)
    for loss in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits):
        found = weights_within(loss(z, torch.ones(4, 2), weight=w).grad_fn)
        assert found is not None
        assert torch.equal(found, w.expand(4, 2))
        assert weights_within(loss(z, torch.ones(4, 2)).grad_fn) is None
    assert weights_within(z.sum().grad_fn) is None


def test_ones_in_place_of_what_a_node_has_computed() -> None:
    y = torch.ones(2, 3, dtype=torch.float64, requires_grad=True).exp()
    ones = ones_for(y.grad_fn)
    assert torch.equal(ones, torch.ones(2, 3, dtype=torch.float64))
    assert alone(y.grad_fn, 0, ones) == [ones]


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


def test_what_divides_is_a_number_or_was_counted() -> None:
    z = torch.ones(3, requires_grad=True).exp().sum()
    for number in (5, 5.0, torch.tensor(5).item()):
        assert not divides_by_tensor((z / number).grad_fn)
    for count in (torch.tensor(5), torch.tensor(5.0), torch.ones(5).sum().double(), (torch.ones(5) > 0).sum()):
        assert divides_by_tensor((z / count).grad_fn)
    assert not divides_by_tensor((z * torch.tensor(5)).grad_fn)
