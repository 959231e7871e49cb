"""Layers whose per-sample gradients are products of one input and one cotangent."""

import pytest
import torch
from torch import nn

from secorder._torch.onednn import ALONE, multiplied_by_onednn
from secorder.layers.norms import squared_norms
from secorder.layers.per_sample import Outer, PerSample, dense
from secorder.layers.rank_one import overwritten, rank_one, squares_by_onednn
from secorder.layers.selection import select_layers

from ..reference import assert_close

N = 5
MODEL = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False))
LAYERS = select_layers(MODEL, None)


def products() -> list[dict[str, PerSample]]:
    """Per-sample gradients of both layers; a rule tells that of a bias also where there is none."""
    torch.manual_seed(0)
    a, g, h = torch.randn(N, 1, 1, 4), torch.randn(N, 1, 1, 6), torch.randn(N, 1, 1, 3)
    return [{"weight": Outer(a, g), "bias": Outer(None, g)}, {"weight": Outer(g.clone(), h), "bias": Outer(None, h)}]


def test_what_is_such_a_product() -> None:
    layer = LAYERS[0]
    (both, _), g = products(), torch.randn(N, 1, 1, 6)
    assert rank_one(layer, both) is not None
    assert rank_one(layer, {**both, "bias": Outer(None, g)}) is None  # other cotangents
    layer = LAYERS[1]
    assert rank_one(layer, {"weight": Outer(torch.randn(N, 1, 1, 6), torch.randn(N, 1, 1, 3))}) is not None
    assert rank_one(layer, {"weight": Outer(torch.randn(N, 1, 2, 6), torch.randn(N, 1, 2, 3))}) is None
    assert rank_one(layer, {"weight": Outer(torch.randn(N, 3, 1, 6), torch.randn(N, 3, 1, 1))}) is None
    assert rank_one(layer, {"weight": torch.randn(N, 18)}) is None


@pytest.mark.parametrize("bad", [None, "inputs", "cotangents"])
def test_norms_of_factors_tell_those_of_their_products(bad: str | None) -> None:
    """With a bias, and without; of one that is not finite nothing is, whatever the other factor is."""
    for layer, gradients in zip(LAYERS, products(), strict=True):
        one = rank_one(layer, gradients)
        assert one is not None
        if bad is not None:
            one.inputs[2], one.cotangents[2] = (torch.inf, 0.0) if bad == "inputs" else (0.0, torch.inf)
        found, sizes = one.norms().squares(), [p.numel() for p in layer.parameters.values()]
        own = {name: gradients[name] for name in layer.parameters}
        rows = torch.cat([dense(part, size) for part, size in zip(own.values(), sizes, strict=True)], 1)
        assert found.isfinite().tolist() == [True, True, bad is None, True, True]
        keep = found.isfinite()
        assert_close(found[keep], rows.square().sum(1)[keep], 1e-12)
        assert_close(squared_norms([[part] for part in own.values()], sizes)[keep], found[keep], 1e-12)


def test_a_factor_that_is_changed_in_place_is_seen() -> None:
    g = torch.randn(N, 1, 1, 6)
    one = rank_one(LAYERS[0], {"weight": Outer(torch.randn(N, 1, 1, 4), g), "bias": Outer(None, g)})
    assert one is not None
    other = one._replace(inputs=torch.ones(N, 4), cotangents=torch.ones(N, 6), versions=[0, 0])
    assert not overwritten([other, one])
    g.zero_()
    assert overwritten([other, one]) == [one.layer.name]


@pytest.mark.skipif(not multiplied_by_onednn(torch.zeros(1, dtype=torch.float32), ALONE), reason="without oneDNN")
@pytest.mark.parametrize(("width", "fan_in"), [(300, 200), (100, 700), (700, 100)])
@pytest.mark.parametrize("bias", [True, False])
def test_squares_stay_where_they_are_made(width: int, fan_in: int, bias: bool) -> None:
    """In one vector, the bias behind the weight, whether it takes a part of a row or several; in single precision."""
    torch.manual_seed(0)
    layer = select_layers(nn.Sequential(nn.Linear(fan_in, width, bias=bias)), None)[0]
    a, g = (torch.randn(128, 1, 1, size, dtype=torch.float32) for size in (fan_in, width))
    one = rank_one(layer, {"weight": Outer(a, g), "bias": Outer(None, g)})
    assert one is not None
    found = squares_by_onednn(one, 0.25)
    assert found is not None
    u, v = g.double().flatten(1).square(), a.double().flatten(1).square()
    expected = 0.25 * torch.cat([(u.t() @ v).flatten(), *[u.sum(0)] * bias])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert found._base is None
    assert squares_by_onednn(one._replace(inputs=one.inputs.double(), cotangents=one.cotangents.double()), 1.0) is None


@pytest.mark.skipif(not multiplied_by_onednn(torch.zeros(1, dtype=torch.float32), ALONE), reason="without oneDNN")
def test_a_bias_before_the_weight_has_its_place() -> None:
    linear = nn.Linear(200, 300)
    weight = linear.weight
    del linear.weight
    linear.register_parameter("weight", weight)
    layer = select_layers(nn.Sequential(linear), None)[0]
    assert list(layer.parameters) == ["bias", "weight"]
    a, g = (torch.randn(128, 1, 1, size, dtype=torch.float32) for size in (200, 300))
    one = rank_one(layer, {"weight": Outer(a, g), "bias": Outer(None, g)})
    assert one is not None
    assert squares_by_onednn(one, 0.25) is None
