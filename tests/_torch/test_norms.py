"""Norms of several tensors at once."""

import torch

from secorder._torch.norms import norms_of


def test_norms_of_tensors_of_any_shape() -> None:
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(2, 0), torch.randn(5, dtype=torch.float32)]
    found = norms_of(tensors)
    assert [n.dim() for n in found] == [0, 0, 0, 0]
    for norm, tensor in zip(found, tensors, strict=True):
        assert norm.dtype is tensor.dtype
        assert torch.allclose(norm, tensor.norm())


def test_half_precision_neither_overflows_nor_is_rounded_to() -> None:
    tensors = [torch.full((300,), 6e4, dtype=torch.float16), torch.ones(257, dtype=torch.bfloat16), torch.ones(2)]
    found = norms_of(tensors)
    assert [n.dtype for n in found] == [torch.float32, torch.float32, torch.float64]
    for norm, tensor in zip(found, tensors, strict=True):
        assert torch.allclose(norm.double(), tensor.double().norm())
