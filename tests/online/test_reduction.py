"""How the loss is made of the samples' losses."""

from typing import Any

import pytest
import torch
from torch import nn

from secorder import InvalidArgumentError
from secorder.online.reduction import check_reduction, loss_scale_of, weights_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "mean"), ("sum", "sum"), (nn.MSELoss(), "mean"), (nn.CrossEntropyLoss(reduction="sum"), "sum")],
)
def test_what_is_taken(given: Any, expected: str) -> None:
    assert check_reduction(given) == expected


@pytest.mark.parametrize("given", ["none", 3, nn.MSELoss(reduction="none"), nn.CrossEntropyLoss(torch.ones(3))])
def test_what_is_not(given: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        check_reduction(given)


def test_weights_are_one_a_sample() -> None:
    assert torch.equal(weights_of(lambda x: x[:, 0], (torch.ones(3, 2),), {}, 3), torch.ones(3))
    with pytest.raises(InvalidArgumentError, match="one a sample"):
        weights_of(lambda x: x, (torch.ones(3, 2),), {}, 3)


def test_scales() -> None:
    assert loss_scale_of(None)() == 1.0
    assert loss_scale_of(0.5)() == 0.5
    assert loss_scale_of(lambda: 3.0)() == 3.0
