"""Many tensors at once are as each by itself."""

import pytest
import torch

from secorder._torch import several
from secorder._torch.several import (
    FEW,
    add_each,
    add_products,
    divide_each,
    multiply_each,
    norms_of,
    set_to_zero,
    square_each,
)


@pytest.mark.parametrize("few", [FEW, 0])
def test_each_tensor_by_itself(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "FEW", few)
    totals = [torch.ones(3), torch.ones(2, dtype=torch.float32), torch.ones(())]
    add_each(totals, [torch.arange(3.0), torch.full((2,), 0.5, dtype=torch.float32), torch.tensor(2.0)])
    divide_each(totals, [2.0, 0.5, 3.0])
    assert [t.tolist() for t in totals] == [[0.5, 1.0, 1.5], [3.0, 3.0], 1.0]
    add_products(totals, square_each(totals), [torch.tensor(True), torch.tensor(False), torch.tensor(2.0)])
    assert [t.tolist() for t in totals] == [[0.75, 2.0, 3.75], [3.0, 3.0], 3.0]
    multiply_each(totals, [torch.tensor(True), torch.tensor(False), torch.tensor(0.5)])
    add_each(totals, [t.clone() for t in totals], beta=2.0, alpha=0.5)
    assert [t.tolist() for t in totals] == [[1.875, 5.0, 9.375], [0.0, 0.0], 3.75]
    add_products(totals, [torch.ones_like(t) for t in totals], [torch.tensor(4.0)] * 3, beta=0.0, alpha=0.5)
    assert [t.tolist() for t in totals] == [[2.0, 2.0, 2.0], [2.0, 2.0], 2.0]
    set_to_zero(totals)
    assert [t.tolist() for t in totals] == [[0.0, 0.0, 0.0], [0.0, 0.0], 0.0]


@pytest.mark.parametrize("few", [FEW, 0])
def test_norms_of_tensors_of_any_shape(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "FEW", few)
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(2, 0), torch.randn(5, dtype=torch.float32)]
    found = norms_of(tensors)
    assert [n.dim() for n in found] == [0, 0, 0, 0]
    for norm, tensor in zip(found, tensors, strict=True):
        assert norm.dtype is tensor.dtype
        assert torch.allclose(norm, tensor.norm())


@pytest.mark.parametrize("few", [FEW, 0])
def test_half_precision_neither_overflows_nor_is_rounded_to(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "FEW", few)
    tensors = [torch.full((300,), 6e4, dtype=torch.float16), torch.ones(257, dtype=torch.bfloat16), torch.ones(2)]
    found = norms_of(tensors)
    assert [n.dtype for n in found] == [torch.float32, torch.float32, torch.float64]
    for norm, tensor in zip(found, tensors, strict=True):
        assert torch.allclose(norm.double(), tensor.double().norm())
