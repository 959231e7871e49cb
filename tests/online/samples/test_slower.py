"""Strategies follow one another from the fastest to the slowest, and skip those that cannot be."""

from collections.abc import Collection

import pytest
import torch
from torch import nn

from secorder import CurvatureProbe
from secorder.layers.selection import Layer, select_layers
from secorder.online.samples.sample_dimension import Question
from secorder.online.samples.slower import slower_of


def strategies(model: nn.Module, layer: Layer | None = None, not_followed: Collection[str] = ()) -> list[str]:
    """How a linear layer is measured, one strategy after the other."""
    slower, names = layer or select_layers(model)[0], {id(m): name for name, m in model.named_modules()}
    asked = Question(model, ((), {}), None, None, False, not_followed)
    parents = {id(child): module for module in model.modules() for child in module.children()}
    found = []
    while slower is not None:
        found.append(_said(slower, names))
        slower = slower_of(asked, parents, slower)
    return found


def _said(layer: Layer, names: dict[int, str]) -> str:
    how = "rule" if layer.rule is not None else "operations" if layer.by_operations else "again"
    return f"{how}: {names[id(layer.enclosing)] or 'model'}"


def test_each_is_followed_by_a_slower_one_up_to_the_model() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Linear(3, 2))
    own = ["rule: 0.0", "operations: 0.0", "again: 0.0", "again: 0", "again: model"]
    assert strategies(model) == own
    assert strategies(model, not_followed=["0.0"]) == [own[0], *own[3:]]


def test_a_list_of_modules_is_never_called() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 3)])

    assert strategies(Listed())[-2:] == ["again: parts.0", "again: model"]


def test_frozen_parameters_are_in_no_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    layer = select_layers(model)[0]
    model[0].bias.requires_grad_(False)
    assert strategies(model, layer) == ["rule: 0", "again: model"]


@pytest.mark.filterwarnings("error")
def test_around_the_model_there_is_nothing() -> None:
    """What was looked for there was a KeyError, of which the probe said that the batch could not be verified."""
    model = nn.Linear(4, 3).requires_grad_(False)
    assert strategies(model) == ["rule: model"]
    with CurvatureProbe(model, reduction="mean", frozen=True):
        model(torch.randn(5, 4))
