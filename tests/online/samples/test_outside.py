"""Layers whose own calls do not tell all."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder._torch.graph import users_of
from secorder.layers.selection import select_layers
from secorder.oneshot.isolation import isolate
from secorder.oneshot.recording import recorded
from secorder.online.samples.outside import share_parameters, uses_outside, without_gradient

from ...helpers import Net


def outside(model: nn.Module, x: Tensor) -> set[str]:
    layers = select_layers(model)
    with isolate(model, None, layers) as isolated, recorded(isolated, layers, own_parameters=False):
        return isolated.run(lambda x: uses_outside(isolated, layers, users_of([model(x)])), x)


def test_a_use_of_a_weight_outside_of_its_layer_is_seen() -> None:
    x = torch.randn(3, 4)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) + F.linear(x, m.a.weight) @ torch.ones(4, 4)

    assert outside(Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x) == set()
    assert outside(Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x) == {"a"}


def test_frozen_layers_with_nothing_to_differentiate_before_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    assert without_gradient(model, select_layers(model), ((torch.randn(3, 4),), {})) == {"0"}


def test_layers_that_share_a_parameter() -> None:
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    one, other, third = select_layers(nn.Sequential(a, b, c))
    assert share_parameters(one, other)
    assert not share_parameters(one, third)


def test_of_layers_that_share_a_parameter_the_one_whose_module_holds_the_other_is_whole() -> None:
    inner = nn.Sequential(nn.Linear(4, 4))
    model = nn.Sequential(inner, nn.Linear(4, 4))
    model[1].weight = inner[0].weight
    one, other = (replace(x, rule=None) for x in select_layers(model, "all"))
    for enclosing, found in (
        ((inner[0], model[1]), {"0.0", "1"}),
        ((inner, model), {"0.0"}),
        ((model, model), set()),
    ):
        layers = [replace(x, enclosing=m) for x, m in zip((one, other), enclosing, strict=True)]
        with isolate(model, None, layers) as isolated:
            assert uses_outside(isolated, layers, users_of([])) == found
