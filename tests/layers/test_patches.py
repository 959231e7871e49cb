"""Patches of images against ``F.unfold`` and against autograd, sample by sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder.layers.contraction import contract
from secorder.layers.patches import Patches, product_in_float32, whole_input, windows
from secorder.layers.rules.convolution import convolution

from ..reference import gradient_by_sample

N = 5


@pytest.mark.parametrize("kernel", [(2, 3), (1, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_windows_are_those_of_unfold(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> None:
    image = torch.randn(N, 3, 7, 8)
    expected = F.unfold(image, kernel, dilation, stride=stride)
    assert torch.equal(windows(image, kernel, stride, dilation, [None, None]), expected)
    fewer = windows(image, kernel, stride, dilation, [2, 1])
    down, across = ((s - d * (k - 1) - 1) // t + 1 for s, k, t, d in zip((7, 8), kernel, stride, dilation, strict=True))
    assert torch.equal(fewer, expected.unflatten(2, (down, across))[:, :, :2, :1].flatten(2))


def test_some_samples_by_groups() -> None:
    image = torch.randn(N, 4, 5, 5)
    patches = Patches(image, (2, 2), (1, 1), (1, 1), 2, (N, 2, 16, 8), (0, 0))
    whole = whole_input(patches)
    assert whole.shape == patches.shape
    assert torch.equal(whole, F.unfold(image, 2).unflatten(1, (2, 8)).transpose(2, 3))
    assert torch.equal(patches[1:3], whole[1:3])
    assert whole_input(whole) is whole


LARGE_CONVOLUTIONS = {  # those that are cheaper as a grouped convolution than as matrix products
    "1d": (nn.Conv1d, (16, 4, 5), {"stride": 2, "padding": 2}, (600,)),
    "2d": (nn.Conv2d, (16, 8, 3), {"dilation": 2, "padding": 1}, (20, 21)),
    "2d_circular": (nn.Conv2d, (16, 8, 3), {"padding": 1, "padding_mode": "circular"}, (16, 16)),
    "2d_groups": (nn.Conv2d, (16, 4, 3), {"padding": 1, "groups": 2}, (9, 8)),
    "2d_depthwise": (nn.Conv2d, (16, 16, 3), {"stride": 2, "groups": 16}, (17, 15)),
    "3d": (nn.Conv3d, (16, 3, 2), {"stride": (1, 2, 1)}, (8, 10, 9)),
}


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_in_single_precision(channels: int, groups: int) -> None:
    """Of inputs that fill registers of the CPU, and of such that do not."""
    model = nn.Conv2d(channels * groups, 16, 3, stride=2, padding=(2, 1), groups=groups).float()
    inputs = torch.randn(N, channels * groups, 7, 8, dtype=torch.float32)
    u, v = (torch.randn_like(model(inputs)) for _ in range(2))
    by_sample, other = (gradient_by_sample(model.double(), (inputs.double(),), g.double())["weight"] for g in (u, v))
    expected = (by_sample * other).sum(0)
    left, right = (convolution(model.float(), (inputs,), g)["weight"] for g in (u, v))
    found = contract(left, right, numel=expected.numel())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("setting", LARGE_CONVOLUTIONS)
def test_large_convolution(setting: str) -> None:
    kind, sizes, options, image = LARGE_CONVOLUTIONS[setting]
    model, inputs = kind(*sizes, **options), torch.randn(N, 16, *image)
    u, v = (torch.randn_like(model(inputs)) for _ in range(2))
    by_sample, other = (gradient_by_sample(model, (inputs,), g)["weight"] for g in (u, v))
    exact = convolution(model, (inputs,), u)["weight"]
    gradients = exact.a.weight_gradients(slice(1, N), exact.g)
    torch.testing.assert_close(gradients.reshape(N - 1, -1), by_sample[1:], rtol=1e-10, atol=1e-10)

    expected = (by_sample * other).sum(0)
    single = model.float()
    left, right = (convolution(single, (inputs.float(),), g.float())["weight"] for g in (u, v))
    assert isinstance(left.a, Patches)
    assert left.a.convolves_well(left.g.shape[3])
    torch.testing.assert_close(
        contract(left, right, numel=expected.numel()).double(),
        expected,
        rtol=0,
        atol=1e-6 * expected.abs().max().item(),
    )


def test_sums_are_not_rounded_to_bfloat16() -> None:
    left, right = torch.ones(2, 1, 257, dtype=torch.bfloat16), torch.ones(2, 257, 1, dtype=torch.bfloat16)
    found = product_in_float32(left, right)
    assert found.dtype is torch.float32
    assert found.flatten().tolist() == [257.0, 257.0]  # bfloat16 holds 256 and 258
