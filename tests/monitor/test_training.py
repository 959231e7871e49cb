"""What training itself tells (losses of several ranks: tests/recording_ranks.py)."""

import pytest
import torch
from torch import nn

from secorder import InvalidTypeError
from secorder.monitor.training import learning_rates, mean_loss, number_of


def test_the_mean_of_losses() -> None:
    assert mean_loss(torch.tensor(6.0), 4, together=False) == mean_loss(6.0, 4, together=False) == 1.5


def test_the_largest_learning_rate_of_each_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    layers = {name: list(layer.parameters()) for name, layer in model.named_children()}
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias, model[1].weight], "lr": 0.2}]
    assert learning_rates(torch.optim.SGD(groups), layers) == {"0": 0.2, "1": 0.2}
    assert learning_rates(None, layers) == {}


def test_what_is_no_number_is_refused() -> None:
    weight = torch.ones(1, requires_grad=True)
    assert not number_of("loss", weight * 2).requires_grad
    assert [number_of("loss", x) for x in (1, 0.5, True)] == [1.0, 0.5, 1.0]
    for wrong in ("high", None, torch.ones(2), [1.0]):
        with pytest.raises(InvalidTypeError, match="'loss' must be a number"):
            number_of("loss", wrong)
