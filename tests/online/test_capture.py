"""Calls of layers: what is kept of them, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning

from ..helpers import Net, data, reference, step
from ..reference import assert_all_close


def test_an_input_that_is_overwritten_before_backward_is_refused() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = x * 1
        out = m.fc(hidden)
        with torch.no_grad():
            hidden.add_(1)
        return out

    model, batch = Net(forward, fc=nn.Linear(4, 3)), data()
    model.fc.weight.requires_grad_(False)  # so that autograd itself does not need the input
    with CurvatureProbe(model) as probe:
        with pytest.warns(CurvatureWarning, match="overwritten in place"):
            step(model, batch)
        with pytest.raises(AttributionError, match="overwritten in place"):
            probe.fisher_diagonal()


def test_calls_with_keywords_and_several_calls() -> None:
    model = Net(lambda m, x: m.fc(input=torch.tanh(m.fc(x))), fc=nn.Linear(4, 4))
    batch = data()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
