"""Convolutions and transposed ones, in all their settings."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import AttributionError, CurvatureProbe
from secorder.layers.per_sample import dense
from secorder.layers.rules.convolution import convolution, transposed_convolution, transposed_convolution_squared

from ...benchmarks.memory import peak_memory
from ...helpers import reference, step
from ...reference import assert_all_close, assert_close, hessian_by_element
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 3, "output_padding": 2},
        {"stride": (1, 2), "padding": (2, 1), "groups": 2},
        {"dilation": 3, "output_padding": 2, "bias": False},
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": (1, 2)},
    ],
)
@pytest.mark.parametrize("size", [(4, 5), (3, 3)], ids=str)
def test_a_transposed_convolution_in_factors(options: dict[str, Any], size: tuple[int, int]) -> None:
    module, a = nn.ConvTranspose2d(4, 6, 3, **options), torch.randn(3, 4, *size)
    g = torch.randn_like(module(a))
    formed = transposed_convolution(module, (a,), g)
    for name, part in transposed_convolution_squared(module, (a,), g).items():
        assert_close(dense(part, formed[name][0].numel()), formed[name].reshape(3, -1))


@pytest.mark.parametrize("accumulate", ["trace", "diagonal"])
def test_no_samples_gradient_of_a_transposed_convolution_is_kept(accumulate: str) -> None:
    """Of all samples together they take 64 times the parameters' memory."""
    model, x = nn.ConvTranspose2d(64, 64, 4, 2, 1), torch.randn(64, 64, 4, 4)

    def run() -> None:
        model.zero_grad()
        model(x).square().mean((1, 2, 3)).mean().backward()

    with CurvatureProbe(model, "all", accumulate=accumulate, reduction="mean"):
        for _ in range(5):  # of which 1, 2 and 4 are verified
            run()
        assert peak_memory(run) < 32 * model.weight.nbytes


@pytest.mark.parametrize("where", [0, 1])
def test_a_transposed_convolution_that_is_not_finite_is_left_out(where: int) -> None:
    model = nn.ConvTranspose1d(2, 2, 3, bias=False)
    again = nn.ConvTranspose1d(2, 2, 3, bias=False)
    again.weight = model.weight
    both = nn.Sequential(model, again)
    with CurvatureProbe(both, "all", reduction="mean") as probe:
        for bad in (False, True):
            x, scale = torch.randn(3, 2, 4), torch.ones(3, 1, 1)
            if bad:
                (x, scale)[where][1] = torch.inf
            (both(x) * scale).square().mean((1, 2)).mean().backward()
        assert probe.num_skipped == {"0": 1, "1": 1}
        assert all(f.isfinite().all() for f in probe.fisher_diagonal().values())


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
