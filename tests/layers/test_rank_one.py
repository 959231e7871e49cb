"""Layers whose per-sample gradients are products of one input and one cotangent."""

import pytest
import torch
from torch import Tensor, nn

from secorder.layers.contraction import contract
from secorder.layers.norms import squared_norms
from secorder.layers.per_sample import Outer, PerSample
from secorder.layers.rank_one import add_rank_one, norms_of_rank_one, rank_one
from secorder.layers.selection import select_layers

N = 5
MODEL = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False))
LAYERS = select_layers(MODEL, None)


def products() -> list[dict[str, PerSample]]:
    """Per-sample gradients of both layers; a rule tells that of a bias also where there is none."""
    torch.manual_seed(0)
    a, g, h = torch.randn(N, 1, 1, 4), torch.randn(N, 1, 1, 6), torch.randn(N, 1, 1, 3)
    return [{"weight": Outer(a, g), "bias": Outer(None, g)}, {"weight": Outer(g.clone(), h), "bias": Outer(None, h)}]


def test_what_is_such_a_product() -> None:
    total, layer = torch.zeros(()), LAYERS[0]
    (both, _), g = products(), torch.randn(N, 1, 1, 6)
    assert rank_one(layer, both, total) is not None
    assert rank_one(layer, {**both, "bias": Outer(None, g)}, total) is None  # other cotangents
    layer = LAYERS[1]
    assert rank_one(layer, {"weight": Outer(torch.randn(N, 1, 1, 6), torch.randn(N, 1, 1, 3))}, total) is not None
    assert rank_one(layer, {"weight": Outer(torch.randn(N, 1, 2, 6), torch.randn(N, 1, 2, 3))}, total) is None
    assert rank_one(layer, {"weight": Outer(torch.randn(N, 3, 1, 6), torch.randn(N, 3, 1, 1))}, total) is None
    assert rank_one(layer, {"weight": torch.randn(N, 18)}, total) is None


def test_a_factor_that_is_changed_in_place_is_seen() -> None:
    g = torch.randn(N, 1, 1, 6)
    one = rank_one(LAYERS[0], {"weight": Outer(torch.randn(N, 1, 1, 4), g), "bias": Outer(None, g)}, torch.zeros(()))
    assert one is not None
    assert not one.overwritten()
    g.zero_()
    assert one.overwritten()


@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_squares_of_several_layers_are_added_as_those_of_each(bad: float | None) -> None:
    gradients = products()
    outs = [{name: torch.ones(p.numel()) for name, p in layer.parameters.items()} for layer in LAYERS]
    expected = [
        {name: 0.5 + 3 * contract(parts[name], numel=out.numel()) for name, out in own.items()}
        for parts, own in zip(gradients, outs, strict=True)
    ]
    factors = [
        one.factors
        for layer, parts in zip(LAYERS, gradients, strict=True)
        if (one := rank_one(layer, parts, torch.zeros(()))) is not None
    ]
    keeps: list[Tensor] | None = None
    if bad is not None:  # then nothing is added of this layer
        factors[0][0][0, 1] = factors[0][1][1, 2] = bad
        expected[0] = {name: 0.5 * out for name, out in outs[0].items()}
        keeps = [torch.tensor(False), torch.tensor(True)]
    add_rank_one(factors, outs, beta=0.5, alpha=3.0, keeps=keeps)
    for found, values in zip(outs, expected, strict=True):
        for name, value in values.items():
            torch.testing.assert_close(found[name], value)


def test_norms_of_several_layers_are_those_of_each() -> None:
    gradients = products()
    ones = [rank_one(layer, parts, torch.zeros(())) for layer, parts in zip(LAYERS, gradients, strict=True)]
    found = norms_of_rank_one([one.factors for one in ones if one is not None], torch.tensor([1.0, 0.0]))
    for layer, parts, norms in zip(LAYERS, gradients, found, strict=True):
        sizes = [p.numel() for p in layer.parameters.values()]
        torch.testing.assert_close(norms, squared_norms([[parts[name]] for name in layer.parameters], sizes))
