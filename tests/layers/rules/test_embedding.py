"""Tables of rows."""

import pytest
import torch
from torch import nn

from .by_sample import assert_exact


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None) -> None:
    words = torch.randint(5, shape)
    words.flatten()[:2] = 0  # the row of the padding, and twice in one sample where there are positions
    assert_exact(nn.Embedding(5, 3, padding_idx=padding_idx), words)


def test_indices_of_another_type() -> None:
    assert_exact(nn.Embedding(5, 3), torch.randint(5, (4, 6), dtype=torch.int32))
