"""Rules by layer type: how they are entered, and for which modules one speaks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secorder import InvalidArgumentError, InvalidTypeError
from secorder.layers.rules import RULES, rule_for, rule_of, takes_any_leading_dim
from secorder.layers.rules.convolution import convolution
from secorder.layers.rules.linear import linear


@pytest.fixture(autouse=True)
def _rules_as_they_were() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def scale(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, Tensor]:
    return {"weight": inputs[0] * g}


def test_a_rule_is_entered_once_and_itself_returned() -> None:
    assert rule_for(Scale()) is None
    assert rule_of(Scale)(scale) is scale
    assert rule_for(Scale()) is scale
    with pytest.raises(InvalidArgumentError, match=r"Scale has a rule already \(scale\)"):
        rule_of(Scale)(scale)
    with pytest.raises(InvalidArgumentError, match="Linear has a rule already"):
        rule_of(nn.Linear)


@pytest.mark.parametrize("target", [int, nn.Linear(2, 2), "Linear"])
def test_targets_that_are_no_module_types(target: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"takes subclasses of torch\.nn\.Module"):
        rule_of(target)
    with pytest.raises(InvalidTypeError):
        rule_of(Scale, target)
    assert Scale not in RULES


@pytest.mark.parametrize("rule", [5, None, {"weight": scale}])
def test_rules_that_cannot_be_called(rule: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"must be callable as rule\(module, inputs, g\)"):
        rule_of(Scale)(rule)
    with pytest.raises(InvalidTypeError, match=r"is the class Scale, not made yet: pass Scale\(\)"):
        rule_of(Scale)(Scale)  # type: ignore[type-var]
    assert Scale not in RULES


def test_no_target() -> None:
    with pytest.raises(InvalidArgumentError, match="needs the layer types"):
        rule_of()


def test_of_subclasses_those_that_compute_the_same() -> None:
    class Renamed(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert rule_for(Renamed(3, 2)) is linear
    assert rule_for(Scaled(3, 2)) is None


def test_modules_whose_parameters_are_not_their_types_own() -> None:
    parametrised = parametrize.register_parametrization(nn.Linear(3, 2), "weight", nn.Tanh())
    extended = nn.Linear(3, 2)
    extended.gain = nn.Parameter(torch.ones(()))
    filled = nn.Linear(3, 2)
    filled.inner = nn.Linear(2, 2)
    replaced = nn.Linear(3, 2)
    replaced.forward = lambda x: x
    assert [rule_for(module) for module in (parametrised, extended, filled, replaced)] == [None] * 4
    assert rule_for(nn.ReLU()) is None


def test_a_rule_that_knows_all_parameters() -> None:
    rule_of(Scale)(scale)
    module = Scale()
    module.shift = nn.Parameter(torch.ones(3))
    assert rule_for(module) is scale


def test_leading_dimensions() -> None:
    assert takes_any_leading_dim(linear)
    assert not takes_any_leading_dim(convolution)
    rule_of(Scale, any_leading_dim=True)(scale)
    assert takes_any_leading_dim(scale)
