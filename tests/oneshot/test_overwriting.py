"""Losses that write to what they are given: measured as training calls them, once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder import CurvatureProbe, diagnose
from secorder.oneshot.overwriting import on_copies

from ..helpers import make, seed
from ..reference import assert_all_close


def counted_from_one(f: Tensor, t: dict[str, Tensor]) -> Tensor:
    """Cross entropy that keeps one class out, of labels that begin at one."""
    f[:, 2] = -9.0
    return F.cross_entropy(f, t["y"].sub_(1), reduction="sum")


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "fisher": lambda probe, loss_fn, *batch: probe.fisher_diagonal(loss_fn, *batch),
    "type-2": lambda probe, loss_fn, *batch: probe.fisher_diagonal(loss_fn, *batch, fisher_type="type-2"),
    "hessian": lambda probe, loss_fn, *batch: probe.hessian_diagonal(loss_fn, *batch),
    "data_set": lambda probe, loss_fn, *batch: probe.hessian_diagonal(loss_fn, [batch, batch]),
    "verify": lambda probe, loss_fn, *batch: {"": torch.tensor([*probe.verify(loss_fn, *batch).ratios.values()])},
    "diagnose": lambda probe, loss_fn, *batch: diagnose(probe._model, loss_fn, [batch, batch]).hessian,
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_targets_stay_as_they_are(name: str) -> None:
    seed(0)
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 2
    given, probe = {"y": labels + 1}, CurvatureProbe(make(), reduction="mean")
    found = MEASUREMENTS[name](probe, counted_from_one, x, given)
    assert_all_close(found, MEASUREMENTS[name](probe, on_copies(counted_from_one), x, given))
    assert torch.equal(given["y"], labels + 1)
