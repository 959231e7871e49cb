"""Many tensors as few."""

import pytest
import torch

from secorder.monitor.stacks import STACKED, norms, stacks


def test_rows_of_any_kinds_are_told_with_their_places() -> None:
    shapes = [(3, 4), (2,), (3, 4), (), (0,), (STACKED // 2 + 1,), (STACKED // 4,), (STACKED // 4,), (STACKED // 4,)]
    tensors = [torch.randn(shape) for shape in shapes] + [torch.randn(2, dtype=torch.float32)]
    seen: dict[int, torch.Tensor] = {}
    for places, rows in stacks(tensors):
        assert len(places) == 1 or rows.numel() <= STACKED
        seen.update(zip(places, rows, strict=True))
    assert sorted(seen) == list(range(len(tensors)))
    assert all(torch.equal(seen[place], tensor) for place, tensor in enumerate(tensors))


def test_norms_and_norms_of_differences() -> None:
    tensors = [torch.randn(3, 4), torch.randn(()), torch.zeros(0), torch.full((100,), 300.0, dtype=torch.float16)]
    tensors += [torch.randn(5, dtype=torch.float32, requires_grad=True), torch.randn(3, 4)]
    expected = [t.detach().double().square().sum().sqrt().item() for t in tensors]
    assert norms(tensors) == pytest.approx(expected, rel=1e-6)
    assert norms([]) == []
    moved = [t.detach() + 2 for t in tensors]
    assert norms(moved, list(stacks(tensors))) == pytest.approx([2 * t.numel() ** 0.5 for t in tensors], rel=1e-3)
