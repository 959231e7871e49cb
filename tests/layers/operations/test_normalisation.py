"""Layer normalisation, as a function."""

import pytest
import torch
import torch.nn.functional as F

from .by_sample import assert_exact


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=str)
def test_layer_norm(index: int, shape: tuple[int, ...]) -> None:
    x, w, b = torch.randn(4, 3, 5), torch.randn(shape), torch.randn(shape)
    assert_exact(lambda x, w, b: F.layer_norm(x, shape, w, b), x, w, b, index=index)
