"""Products of positions by pixels against those of the patches written out."""

import pytest
import torch
from torch import nn

from secorder.layers import norms
from secorder.layers.grams import pixel_grams, pixels
from secorder.layers.norms import squared_norms
from secorder.layers.patches import Patches
from secorder.layers.per_sample import Outer, dense
from secorder.layers.rules.convolution import convolution

from ..reference import assert_close

N = 4

SETTINGS = {  # arguments of the layer, and the size of images
    "1d": (nn.Conv1d, (4, 6, 3), {"padding": 1}, (5,)),
    "1d_pixel": (nn.Conv1d, (4, 6, 1), {"padding": 2}, (5,)),
    "2d": (nn.Conv2d, (4, 6, 3), {"padding": 1}, (4, 5)),
    "2d_inside": (nn.Conv2d, (4, 6, (3, 2)), {}, (5, 4)),
    "2d_far": (nn.Conv2d, (4, 6, 2), {"padding": 4, "dilation": (3, 5)}, (3, 2)),
    "2d_flat": (nn.Conv2d, (4, 6, (1, 2)), {"padding": (1, 0)}, (3, 5)),
    "2d_wide": (nn.Conv2d, (4, 6, (4, 3)), {"padding": (2, 3), "dilation": (1, 2)}, (5, 6)),
    "2d_groups": (nn.Conv2d, (4, 6, 3), {"padding": 1, "groups": 2}, (4, 4)),
    "2d_circular": (nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "circular"}, (4, 4)),
    "3d": (nn.Conv3d, (4, 6, (2, 3, 1)), {"padding": (0, 1, 2)}, (3, 4, 2)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_products_of_pixels(setting: str, channels_last: bool) -> None:
    kind, sizes, options, image = SETTINGS[setting]
    layer, inputs = kind(*sizes, **options), torch.randn(N, 4, *image)
    if channels_last:
        inputs = inputs.movedim(1, -1).contiguous().movedim(-1, 1)
    parts = convolution(layer, (inputs,), torch.randn_like(layer(inputs)))
    weight, bias = parts["weight"], parts["bias"]
    assert isinstance(weight, Outer)
    a, g = weight
    assert isinstance(a, Patches)
    assert pixels(a) is not None
    of_a, of_g = pixel_grams(a, g, slice(1, N))
    written = dense(weight, layer.weight.numel())[1:]
    assert_close((of_a * of_g).view(N - 1, -1).sum(1), written.square().sum(1), 1e-12)
    of_bias = dense(bias, layer.bias.numel())[1:]
    assert_close(of_g.view(N - 1, -1).sum(1), of_bias.square().sum(1), 1e-12)


def test_positions_further_apart_are_no_pixels() -> None:
    layer, inputs = nn.Conv2d(2, 3, 2, stride=(1, 2)), torch.randn(N, 2, 4, 5)
    a = convolution(layer, (inputs,), layer(inputs))["weight"].a
    assert isinstance(a, Patches)
    assert pixels(a) is None


def test_many_channels_of_small_images_go_by_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples at once, or one after the other; with a bias, or without."""
    layer, inputs = nn.Conv2d(60, 50, 3, padding=1), torch.randn(N, 60, 4, 4)
    parts = convolution(layer, (inputs,), torch.randn_like(layer(inputs)))
    sizes = [layer.weight.numel(), layer.bias.numel()]
    written = [dense(parts[name], size) for name, size in zip(("weight", "bias"), sizes, strict=True)]
    monkeypatch.delattr(norms, "_by_gradients")
    monkeypatch.delattr(norms, "_by_products")
    for part in (norms.FORMED_PART, 1 << 12):
        monkeypatch.setattr(norms, "FORMED_PART", part)
        both = squared_norms([[parts["weight"]], [parts["bias"]]], sizes)
        assert_close(both, torch.cat(written, 1).square().sum(1), 1e-12)
        assert_close(squared_norms([[parts["weight"]]], sizes[:1]), written[0].square().sum(1), 1e-12)
