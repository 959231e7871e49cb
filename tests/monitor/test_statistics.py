"""Statistics of diagonals."""

import pytest
import torch

from secorder import get_layer_curvature_stats


def test_statistics() -> None:
    stats = get_layer_curvature_stats({"a": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "b": torch.tensor([5.0])})
    assert stats == {
        "a": {"mean": 3.0, "std": pytest.approx(14**0.5 / 3**0.5), "max": 6.0, "min": 1.0},
        "b": {"mean": 5.0, "std": 0.0, "max": 5.0, "min": 5.0},
    }
    assert all(type(value) is float for layer in stats.values() for value in layer.values())
    assert get_layer_curvature_stats({}) == {}
    assert get_layer_curvature_stats({"h": torch.tensor([1.0, 3.0], dtype=torch.float16)})["h"]["mean"] == 2.0


def test_statistics_take_one_transfer_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    for name in ("tolist", "item", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, o=original, n=name: (transfers.append(n), o(self, *a))[1]
        )
    get_layer_curvature_stats({str(i): torch.randn(5) for i in range(20)})
    assert transfers == ["tolist"]
