"""Norms of many tensors."""

import pytest
import torch

from secorder._torch.foreach import norms


def test_norms_of_tensors_of_any_kind() -> None:
    tensors = [torch.randn(3, 4), torch.randn(()), torch.zeros(0), torch.full((100,), 300.0, dtype=torch.float16)]
    tensors += [torch.randn(5, dtype=torch.float32, requires_grad=True)]
    expected = [t.detach().double().square().sum().sqrt().item() for t in tensors]
    assert norms(tensors) == pytest.approx(expected, rel=1e-6)
    assert norms([]) == []
