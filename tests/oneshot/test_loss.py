"""The loss is looked at before anything is measured on it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import InvalidArgumentError, InvalidTypeError, NonFiniteError
from secorder.layers.selection import select_layers
from secorder.oneshot.isolation import isolate
from secorder.oneshot.loss import check_loss, losses, require_dependence

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
