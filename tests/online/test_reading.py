"""What was accumulated is told as a mean, or it is said why it is not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, ProbeStateError
from secorder.online.reading import diagonals, num_samples, num_skipped, untold

from ..helpers import data, make, reference
from ..reference import assert_all_close


def test_the_mean_over_all_samples() -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        assert num_samples(probe._fisher) == len(batch[0])
        assert num_skipped(probe._fisher) == {}
        assert untold(probe._fisher) == {}
        assert_all_close(diagonals(probe._fisher).by_parameter(), reference(model, batch))


def test_nothing_seen_raises() -> None:
    with CurvatureProbe(make()) as probe, pytest.raises(ProbeStateError, match="was not called"):
        diagonals(probe._fisher)


def test_layers_that_cannot_be_told_are_raised_for_or_left_out() -> None:
    model, batch = make(), data()
    first = next(module for module in model if isinstance(module, nn.Linear))
    with CurvatureProbe(model, reduction="mean") as probe:
        loss = F.cross_entropy(model(batch[0]), batch[1]) + first.weight.square().sum()
        loss.backward()
        (name,) = untold(probe._fisher)
        with pytest.raises(AttributionError, match=f"layer '{name}'"):
            diagonals(probe._fisher)
        told = diagonals(probe._fisher, "skip")
        assert set(told) == set(probe.layer_names) - {name}
        assert all(torch.isfinite(value).all() for value in told.values())


def test_what_gave_the_gradients_is_told() -> None:
    """By a rule, by operations, by a module that runs again."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return 2 * w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * g

    class Scaled(nn.Module):
        def __init__(self, *, by_hand: bool) -> None:
            super().__init__()
            self.w, self.by_hand = nn.Parameter(torch.rand(3)), by_hand

        def forward(self, x: Tensor) -> Tensor:
            return x * (Doubled.apply(self.w) if self.by_hand else self.w)

    model = nn.Sequential(nn.Linear(2, 3), Scaled(by_hand=False), nn.Tanh(), Scaled(by_hand=True), nn.Linear(3, 1))
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        model(torch.randn(4, 2)).square().mean().backward()
        found = probe.fisher_diagonal()
        assert {name: info.source for name, info in found.info.items()} == {
            "0": "rule", "1": "operations", "3": "module", "4": "rule"
        }  # fmt: skip
        one_shot = probe.fisher_diagonal(F.mse_loss, torch.randn(4, 2), torch.randn(4, 1))
    assert {info.source for name, info in one_shot.info.items() if name in "014"} <= {"rule", "operations"}
