"""Which layers hold a parameter together (that their curvature is exact: tests/test_tied.py)."""

import pytest
from torch import nn

from secorder.layers.rules import rule_for
from secorder.layers.selection import select_layers
from secorder.layers.tying import tied_layers


def decoder() -> nn.ModuleDict:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    return model


def test_nothing_is_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    assert tied_layers(model, select_layers(model)) == ([], {})


@pytest.mark.parametrize("selected", ["embedding", "head"])
def test_all_that_hold_a_parameter_are_found_from_any_of_them(selected: str) -> None:
    model = decoder()
    together, ties = tied_layers(model, select_layers(model, layers=[selected, "body"]))
    assert {layer.name for layer in together} == {"embedding", "body", "head"}
    assert all(layer.rule is rule_for(layer.module) is not None for layer in together)
    assert set(ties) == {selected}
    assert set(ties[selected]["weight"]) == {("embedding", "weight"), ("head", "weight")}
    if selected == "head":
        assert ties[selected]["bias"] == [("head", "bias")]


def test_a_module_without_a_rule_is_not_among_them() -> None:
    model = decoder()
    model["cell"] = nn.LSTMCell(3, 3)
    model["cell"].weight_ih = nn.Parameter(model["body"].weight.detach().repeat(4, 1))
    model["cell"].weight_hh = model["cell"].weight_ih
    together, _ = tied_layers(model, select_layers(model, layers="*"))
    assert next(layer for layer in together if layer.name == "cell").rule is None


def test_a_module_that_is_read_and_not_called_is_not_among_them() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    model["linear"].weight = model["attention"].out_proj.weight
    together, ties = tied_layers(model, select_layers(model, layers="linear"))
    assert (together, ties) == ([], {})
    together, ties = tied_layers(model, select_layers(model, layers=["linear", "attention.out_proj"]))
    assert {layer.name: layer.rule for layer in together}["attention.out_proj"] is None
    assert ties == {"linear": {"weight": [("linear", "weight")], "bias": [("linear", "bias")]}}
