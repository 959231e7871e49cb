"""The losses of samples alone, and whether the batch's is made of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CouplingError, InvalidArgumentError, NonFiniteError
from secorder.oneshot.measurement import Measurement
from secorder.oneshot.sample_losses import own_losses, require_own_losses

from ..helpers import data, make, measured

WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def mine(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f, t)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), mine, nn.CrossEntropyLoss(reduction="sum")])
def test_losses_of_batches_of_one(loss_fn: Any) -> None:
    model, (x, y) = make(), data()
    found = measured(lambda task: own_losses(task, task.loss()[0]).detach(), model, (x, y), loss_fn)
    assert torch.allclose(found, torch.stack([loss_fn(model(x[n : n + 1]), y[n : n + 1]) for n in range(6)]).detach())


def test_a_loss_that_a_sample_alone_has_not() -> None:
    def standardised(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) / f.std(0).sum()

    with pytest.raises(NonFiniteError, match="sample 0 taken alone"):
        measured(lambda task: own_losses(task, task.loss()[0]), make(), data(), standardised)


def check(task: Measurement) -> bool:
    output, _ = task.loss()
    point = output.detach().requires_grad_()
    gradient = torch.autograd.grad(task.loss_again(point, task.targets), point, create_graph=True)
    return require_own_losses(task, point, [point], gradient, second_order=True) is not None


def test_losses_of_samples_pass_and_others_are_told_apart() -> None:
    held = torch.rand(6)

    def weighted(f: Tensor, t: Tensor) -> Tensor:
        return (F.cross_entropy(f, t, reduction="none") * held).mean()

    def centred(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f - f.mean(0).detach(), t)

    assert measured(check, make(), data(), mine)
    assert not measured(check, make(), data(), nn.CrossEntropyLoss())  # PyTorch's own needs no look
    assert measured(check, make(), data(), nn.CrossEntropyLoss(weight=WEIGHTS))  # unless it has weights
    with pytest.raises(InvalidArgumentError, match="does not treat the samples of a batch alike"):
        measured(check, make(), data(), weighted)
    with pytest.raises(CouplingError, match="statistic of the batch"):
        measured(check, make(), data(), centred)
