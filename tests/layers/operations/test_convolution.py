"""Convolutions, as functions."""

import pytest
import torch
import torch.nn.functional as F

from .by_sample import assert_exact


@pytest.mark.parametrize("index", [1, 2])
def test_convolution(index: int) -> None:
    x, w, b = torch.randn(3, 4, 6, 5), torch.randn(2, 2, 3, 2), torch.randn(2)
    assert_exact(
        lambda *t: F.conv2d(*t, stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2), x, w, b, index=index
    )


def test_a_transposed_one_is_left_to_the_operation_itself() -> None:
    assert_exact(F.conv_transpose1d, torch.randn(3, 4, 5), torch.randn(4, 2, 3), ruled=False)
