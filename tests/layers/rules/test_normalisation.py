"""Layers that scale and shift a normalised input."""

from typing import Any

import pytest
import torch
from torch import nn

from secorder import AttributionError
from secorder.layers.rules.normalisation import batch_norm, instance_norm

from .by_sample import assert_exact


@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_over_the_last_dimensions(kind: Any, shape: tuple[int, ...], positions: tuple[int, ...]) -> None:
    assert_exact(kind(shape), torch.randn(5, *positions, *shape))


def test_layer_norm_without_a_bias() -> None:
    assert_exact(nn.LayerNorm(4, bias=False, eps=0.1), torch.randn(5, 4))


@pytest.mark.parametrize("image", [(), (6,), (3, 2)], ids=str)
def test_group_norm(image: tuple[int, ...]) -> None:
    assert_exact(nn.GroupNorm(2, 4), torch.randn(5, 4, *image))


NORMS = {
    "instance": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_by_channel(name: str, running: bool, training: bool, spatial: int) -> None:
    """In train mode of batch norm, for the statistics as they are: parameters act on each sample alone all the same."""
    module = NORMS[name][spatial - 1](3, affine=True, track_running_stats=running)
    images = 2 + 3 * torch.randn(4, 3, *(4, 3, 2)[:spatial])
    module(images)  # so that running statistics are not 0 and 1
    assert_exact(module.train(training), images)


def test_batch_norm_of_rows() -> None:
    assert_exact(nn.BatchNorm1d(3).eval(), torch.randn(4, 3))


def test_an_image_without_a_batch_dimension() -> None:
    module, image = nn.InstanceNorm1d(3, affine=True), torch.randn(3, 5)
    with pytest.raises(AttributionError, match="without a batch dimension"):
        instance_norm(module, (image,), module(image))


def test_running_statistics_in_the_inputs_dtype() -> None:
    module, x = nn.BatchNorm1d(3).eval(), torch.randn(4, 3)
    module.running_mean, module.running_var = torch.randn(3), torch.rand(3) + 0.5
    found = batch_norm(module, (x.bfloat16(),), torch.ones(4, 3).bfloat16())["weight"]
    assert found.dtype is torch.bfloat16
