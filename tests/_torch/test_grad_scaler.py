"""A loss that a GradScaler has multiplied."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.grad_scaler import multiplied_by_scaler


class Scaler(torch.amp.GradScaler):
    """Of a kind of its own, such as that of FSDP."""


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, Scaler])
@pytest.mark.parametrize(
    ("scaled", "expected"),
    [
        (lambda scaler, loss: scaler.scale(loss), True),
        (lambda scaler, loss: scaler.scale(loss) / 4, True),
        (lambda scaler, loss: loss.exp() + scaler.scale(loss), True),
        (lambda scaler, loss: loss.exp() - scaler.scale(loss), True),
        (lambda scaler, loss: loss * 1024.0, False),
        (lambda scaler, loss: loss * torch.tensor(2048.0), False),
        (lambda scaler, loss: scaler.scale([loss, loss.exp()])[1], True),
        (lambda scaler, loss: sum(scaler.scale((loss, loss.exp()))), True),
        (lambda scaler, loss: loss, False),
        (lambda scaler, loss: F.cross_entropy(loss.expand(2, 3), torch.zeros(2).long(), label_smoothing=0.1), False),
    ],
    ids=["scaled", "divided", "summed", "subtracted", "number", "tensor", "list", "summed list", "plain", "by numbers"],
)
def test_its_factor_is_known(kind: Any, scaled: Callable[[Any, Tensor], Tensor], *, expected: bool) -> None:
    scaler = kind("cpu", init_scale=1024.0)
    loss = torch.ones(3, requires_grad=True).square().mean()
    scaler.scale(loss)  # makes its factor
    assert multiplied_by_scaler(scaled(scaler, loss).grad_fn) is expected


def test_a_number_that_somebody_holds_is_no_scalers() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = torch.ones(3, requires_grad=True).square().mean()
    scaler.scale(loss)  # makes its factor
    held = [torch.tensor(1024.0)]
    assert not multiplied_by_scaler((loss * held[0]).grad_fn)
