"""The loss is looked at before anything is measured on it."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import InvalidArgumentError, InvalidTypeError, NonFiniteError, per_layer_fisher_diagonal
from secorder.layers.selection import select_layers
from secorder.oneshot.isolation import isolate
from secorder.oneshot.loss import check_loss, losses, require_dependence, require_loss_function

from ..helpers import Fn, data, make


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (3.0, InvalidTypeError, "got float"),
        (torch.ones(2), InvalidArgumentError, r"got shape \(2,\)"),
        (torch.tensor(torch.inf), NonFiniteError, "first in the output of layer '1'"),
    ],
)
def test_what_is_no_finite_scalar_is_refused(loss: Any, error: type[Exception], words: str) -> None:
    model, (x, _) = make(Fn(lambda h: h / 0)), data()
    with isolate(model, None, select_layers(model)) as isolated, pytest.raises(error, match=words):
        check_loss(loss, isolated, x)


def test_one_element_is_a_scalar() -> None:
    model, (x, _) = make(), data()
    with isolate(model, None, []) as isolated:
        assert check_loss(torch.ones(1, 1), isolated, x).shape == ()


def test_losses_of_several_batches_start_from_one_state() -> None:
    model, batch = make(nn.Dropout()), data()
    first, second, other = losses(model, F.cross_entropy, [batch, batch, data()])
    assert first == second != other
    assert not first.requires_grad


def test_a_loss_that_depends_on_no_parameter_is_refused() -> None:
    model, (x, y) = make(), data()
    require_dependence(model, F.cross_entropy, x, y)
    with pytest.raises(InvalidArgumentError, match="does not depend"):
        require_dependence(model, lambda f, t: F.cross_entropy(f.detach(), t), x, y)


def test_what_a_loss_asks_of_a_tensor_is_not_said_to_be_for_targets_without_tensors() -> None:
    model, (x, _) = make(), data()
    with pytest.raises(AttributeError, match="has no attribute 'total'"):
        per_layer_fisher_diagonal(model, lambda f, t: f.total(), x, ["a"] * len(x))
    with pytest.raises(InvalidTypeError, match="hold no tensor"):
        per_layer_fisher_diagonal(model, lambda f, t: f[:, t.long()].sum(), x, [0] * len(x))


def of_three(model: nn.Module, f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(model(f), t)


def by_name(f: Tensor, *, target: Tensor) -> Tensor:
    return F.cross_entropy(f, target)


class OfOne(nn.Module):
    def forward(self, f: Tensor) -> Tensor:
        return f.square().mean()


@pytest.mark.parametrize("loss_fn", [of_three, by_name, lambda f: f.square().mean(), OfOne()])
@pytest.mark.parametrize("targets", [None, torch.tensor([0, 1])])
def test_losses_of_other_arguments_are_told(loss_fn: Any, targets: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"loss_fn\(outputs, targets\), whose arguments are \(.*wrap it"):
        require_loss_function(loss_fn)
    with pytest.raises(InvalidTypeError, match="wrap it"):
        per_layer_fisher_diagonal(nn.Linear(3, 2), loss_fn, torch.randn(2, 3), targets)


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.mse_loss,
        nn.MSELoss(),
        partial(F.cross_entropy, reduction="sum"),
        torch.dist,
        max,
        torch.jit.script(nn.MSELoss()),
        torch.jit.script(F.l1_loss),
        torch.compile(nn.MSELoss()),
        torch.compile(lambda f, t: (f - t).abs().mean()),
        lambda *pair: pair[0].mean(),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_losses_of_two_arguments_and_of_none_that_are_known(loss_fn: Any) -> None:
    require_loss_function(loss_fn)


def test_batches_that_are_no_pairs_are_told() -> None:
    x, y = data()
    names = ["a"] * 6
    for batches in ([(x, y, y)], [(x, y, names), (x, y, names)]):
        with pytest.raises(InvalidArgumentError, match=r"make it a pair \(inputs, targets\) in place of 3"):
            per_layer_fisher_diagonal(make(), F.cross_entropy, batches)
    with pytest.raises(InvalidArgumentError, match=r"make each batch a pair \(inputs, targets\)"):
        per_layer_fisher_diagonal(make(), F.cross_entropy, (x, y, y))
