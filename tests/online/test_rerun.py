"""Layers whose own calls do not tell are measured by the module around them."""

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning

from ..helpers import Net, data, make, reference, step
from ..reference import assert_all_close


def test_frozen_layer_without_gradient_is_measured_by_the_module_around_it() -> None:
    model, batch = make(), data()
    model[0].requires_grad_(False)
    probe = CurvatureProbe(model, frozen=True, reduction="mean")
    with pytest.warns(CurvatureWarning, match=r"\['0'\].*exact and slow"):
        step(model, batch)
    step(model, batch)  # warns once
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


class Cell(nn.Module):
    """Returns what it goes on computing with; frozen in part, so that operations do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.gate = nn.Parameter(torch.randn(5), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = torch.tanh(x @ self.weight)
        output = torch.sin(self.gate * state)
        return state, output.cos(), output


def test_an_output_that_the_module_computes_another_one_from() -> None:
    """The gradient on it holds what comes through the other, which running the module again brings once more."""
    model = Net(lambda m, x: m.head(sum(m.cell(x))), cell=Cell(), head=nn.Linear(5, 3))
    batch = data()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        step(model, batch)
        fisher = probe.fisher_diagonal()
    assert fisher.info["cell"].measured_by == "rerun"
    assert_all_close(fisher.by_parameter(), reference(model, batch))
