"""Products of bfloat16 matrices keep what float32 holds of them."""

import torch

from secorder._torch.matrix_units import product_in_float32


def test_sums_are_not_rounded_to_bfloat16() -> None:
    left, right = torch.ones(2, 1, 257, dtype=torch.bfloat16), torch.ones(2, 257, 1, dtype=torch.bfloat16)
    found = product_in_float32(left, right)
    assert found.dtype is torch.float32
    assert found.flatten().tolist() == [257.0, 257.0]  # bfloat16 holds 256 and 258
