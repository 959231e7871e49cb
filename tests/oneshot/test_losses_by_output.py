"""The derivatives of samples' losses in the model's output, by definition and by looking."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder.oneshot.losses_by_output import losses_by_definition, losses_by_output
from secorder.oneshot.measurement import Measurement

from ..helpers import data, make, measured


def mine(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f, t)


def expected(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    f = model(x).detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(f, y, reduction="sum"), f)[0]


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(reduction="sum"), mine])
def test_gradients_are_those_of_batches_of_one(loss_fn: Any) -> None:
    def both(task: Measurement) -> list[Tensor]:
        output, loss = task.loss()
        by_definition = losses_by_definition(task, output, loss, [], second_order=False)
        by_output = losses_by_output(task, output, loss, [], second_order=True)
        assert by_output is not None
        (g,), (point,) = by_output.gradients, by_output.points
        assert g is not None
        found = [g.detach(), torch.autograd.grad(g.sum(), point)[0]]
        return found + [g for g in ([] if by_definition is None else by_definition.gradients) if g is not None]

    model, (x, y) = make(), data()
    first, slope, *again = measured(both, model, (x, y), loss_fn)
    assert torch.allclose(first, expected(model, x, y), rtol=1e-12)
    assert slope.abs().amax() < 1e-12  # a softmax does not change when a number is added to all logits
    assert len(again) == (0 if loss_fn is mine else 1)
    assert all(torch.allclose(g, first, rtol=1e-12) for g in again)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_inside_of_the_model_come_in_the_same_pass(reduction: str) -> None:
    model, (x, y) = make(), data()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    hidden = model[0](x).detach().requires_grad_()
    other = torch.zeros(3, dtype=x.dtype, requires_grad=True)  # which the output does not depend on

    def side(task: Measurement) -> tuple[Tensor, Tensor]:
        output = model[1:](hidden)
        found = losses_by_definition(task, output, loss_fn(output, y), [hidden, other], second_order=False)
        assert found is not None
        return found.at_leaves[id(hidden)], found.at_leaves[id(other)]

    (expected,) = torch.autograd.grad(F.cross_entropy(model[1:](hidden), y, reduction="sum"), hidden)
    at_hidden, at_other = measured(side, model, (x, y), loss_fn)
    assert torch.allclose(at_hidden, expected, rtol=1e-12)
    assert not at_other.any()


def test_a_loss_that_reaches_into_the_model_is_none_of_the_outputs() -> None:
    model = make()

    def penalised(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + model[0].weight.square().sum()

    def side(task: Measurement) -> bool:
        return losses_by_output(task, *task.loss(), [], second_order=False) is None

    assert measured(side, model, data(), penalised)
