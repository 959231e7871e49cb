"""What each measurement would take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError, Strategy
from secorder.oneshot import quantity as quantity_module
from secorder.oneshot.eigenvalues import Ends, lanczos
from secorder.oneshot.fisher_pairs import Asked
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.quantity import quantity_cost

from ..benchmarks.memory import peak_memory
from ..helpers import data, measured, mlp, seed, seeded


def cost(quantity: str, **options: object) -> object:
    how = {"asked": Asked("mc", 5), "ends": Ends(max_iterations=7), **options}
    return measured(lambda task: quantity_cost(task, quantity, Budget("exact"), **how), mlp(), data())  # type: ignore[arg-type]


def test_products_are_those_of_what_was_asked() -> None:
    assert {c.num_hvps for c in cost("fisher").values()} == {5}
    assert {c.num_hvps for c in cost("eigenvalues").values()} == {7}
    assert {c.strategy for c in cost("eigenvalues").values()} == {Strategy.OUTPUT_PRODUCTS}
    assert {c.num_hvps for c in cost("eigenvalues", ends=Ends(max_iterations=10**6)).values()} == {
        30,
        35,
        18,
    }  # of the parameters
    assert cost("trace") == cost("hessian")


class Recurrent(nn.Module):
    """Of which products are made on the parameters, on a graph of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(2, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.core(x.unflatten(1, (20, 2)))[0][:, -1])
        return found


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 3))


@pytest.mark.parametrize(("make_model", "most", "samples"), [(chain, 200, 32), (Recurrent, 8, 128)])
def test_memory_of_eigenvalues_is_that_which_is_spent(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[[], nn.Module], most: int, samples: int
) -> None:
    """Of as many vectors as it takes to converge, not as may be made."""
    seed()
    monkeypatch.setattr("secorder.oneshot.quantity.TRIAL_SECONDS", 600.0)  # however slow the machine
    batch = torch.randn(samples, 40), torch.arange(samples) % 3
    with CurvatureProbe(make_model(), "all") as probe:
        told = probe.estimate_cost(F.cross_entropy, *batch, quantity="eigenvalues", max_iterations=most).num_bytes
        spent = peak_memory(
            lambda: probe.hessian_eigenvalues(F.cross_entropy, *batch, generator=seeded(), max_iterations=most)
        )
    assert told / 1.5 < spent < 1.5 * told


@pytest.mark.parametrize("ends", [{}, {"which": "top"}, {"which": "largest", "tolerance": 0.03}, {"count": 3}], ids=str)
def test_products_of_eigenvalues_are_those_of_the_ends_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, ends: dict[str, Any]
) -> None:
    seed()
    found = []
    monkeypatch.setattr(quantity_module, "TRIAL_SECONDS", 600.0)  # until it converges
    monkeypatch.setattr(quantity_module, "_FIRST", 200)
    monkeypatch.setattr(quantity_module, "lanczos", lambda *how: found.append(lanczos(*how)) or found[-1])
    batch = torch.randn(32, 40), torch.arange(32) % 3
    with CurvatureProbe(chain(), "all") as probe:
        probe.estimate_cost(F.cross_entropy, *batch, quantity="eigenvalues", **ends)
        spent = probe.hessian_eigenvalues(F.cross_entropy, *batch, generator=seeded(), **ends)
        for name, value in ends.items():
            with pytest.raises(InvalidArgumentError, match=f'{name}.* goes with quantity="eigenvalues"'):
                probe.estimate_cost(F.cross_entropy, *batch, **{name: value})
    assert [f.num_hvps for f in found] == pytest.approx([f.num_hvps for f in spent.values()], rel=0.25)


def test_others_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="quantity must be"):
        cost("gradient")
