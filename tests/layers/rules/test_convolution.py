"""Convolutions and transposed ones, in all their settings."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import AttributionError, CurvatureProbe
from secorder.layers.rules.convolution import convolution, transposed_convolution

from ...helpers import reference, step
from ...reference import assert_all_close, hessian_by_element
from .by_sample import assert_exact

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "groups": {"groups": 2},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "dilation": {"dilation": 2},
    "all": {"groups": 2, "stride": 2, "padding": 1, "dilation": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolution(spatial: int, setting: str) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    assert_exact(kind(4, 6, 2, **SETTINGS[setting]), torch.randn(3, 4, *(5, 4, 4)[:spatial]))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"], ids=str)
def test_padding_that_is_not_zero(mode: str, padding: Any) -> None:
    assert_exact(nn.Conv2d(1, 2, (2, 4), padding=padding, padding_mode=mode), torch.randn(3, 1, 5, 6))


@pytest.mark.parametrize("setting", [*SETTINGS, "output_padding"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_transposed_convolution(spatial: int, setting: str) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    options = {"stride": 3, "output_padding": 2} if setting == "output_padding" else SETTINGS[setting]
    assert_exact(kind(4, 6, 2, **options), torch.randn(3, 4, *(4, 3, 3)[:spatial]))


@pytest.mark.parametrize("padding", [(0, 2), "same"])
def test_a_convolution_whose_settings_are_changed_after_it_was_made(padding: tuple[int, int] | str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.LazyLinear(3))
    model[0].padding = padding
    if padding == "same":
        model[0].dilation = (2, 1)
    batch = (torch.randn(4, 1, 6, 5), torch.randint(3, (4,)))
    model(batch[0])
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    hessian = probe.hessian_diagonal(F.cross_entropy, *batch, method="exact").by_parameter()
    assert_all_close(hessian, hessian_by_element(model, F.cross_entropy, *batch))


def test_an_image_without_a_batch_dimension() -> None:
    image = torch.randn(2, 4, 4)
    for module, rule in ((nn.Conv2d(2, 3, 2), convolution), (nn.ConvTranspose2d(2, 3, 2), transposed_convolution)):
        with pytest.raises(AttributionError, match=r"without a batch dimension.*unsqueeze"):
            rule(module, (image,), module(image))
