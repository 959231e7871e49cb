"""What a Hessian will take is what it then takes."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import CurvatureProbe, DoubleBackwardError
from secorder.oneshot import timing
from secorder.oneshot.hessian import cost as cost_module
from secorder.oneshot.hessian import decision
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.choice import Choice
from secorder.oneshot.hessian.cost import estimate_cost, layer_cost
from secorder.oneshot.hessian.facts import Facts
from secorder.oneshot.hessian.trials import learn_seconds
from secorder.results import Strategy

from ...benchmarks.memory import peak_memory
from ...helpers import data, make, measured, mlp, seed


class Narrower(nn.Module):
    """Arithmetic in another precision, as normalisations of language models do it: no chain gets through."""

    def forward(self, x: Tensor) -> Tensor:
        low = x.float()
        return (low * low.square().mean(1, keepdim=True).rsqrt()).to(x.dtype)


@pytest.mark.parametrize("budget", [Budget("exact"), Budget("hutchinson", num_draws=7)])
def test_the_strategies_are_those_that_run(budget: Budget) -> None:
    for model in (mlp(), make(nn.ReLU()), make(nn.BatchNorm1d(5), nn.Tanh()), make(Narrower(), nn.Tanh())):
        batch = data()
        told = measured(lambda task: estimate_cost(task, budget), model, batch)
        with CurvatureProbe(model, "all") as probe:
            draws = budget.num_draws if budget.method == "hutchinson" else None
            info = probe.hessian_diagonal(F.cross_entropy, *batch, method=budget.method, num_draws=draws).info
        assert {n: str(i.strategy).split("+")[-1] for n, i in info.items()} == {n: c.strategy for n, c in told.items()}


def test_memory_is_that_of_a_chunk_of_products() -> None:
    facts = Facts("0", numel=25, output_elements=50, parameter_elements=1000)

    def bytes_of(strategy: Strategy, products: int, chunk_size: int | None) -> int:
        def work(task):  # type: ignore[no-untyped-def]
            return layer_cost(task, facts, Choice(strategy, products, products)).num_bytes

        return measured(work, make(), data(), chunk_size=chunk_size)

    assert bytes_of(Strategy.OUTPUT_BASIS, 5, None) == 4 * 5 * 50 * 8
    assert bytes_of(Strategy.OUTPUT_BASIS, 5, 2) == 4 * 2 * 50 * 8
    assert bytes_of(Strategy.PARAMETER_BASIS, 5, None) == 4 * 5 * 1000 * 8
    assert dataclasses.replace(facts, numel=1).layer == "0"


def test_an_operator_without_a_second_derivative_is_named_as_by_the_measurement() -> None:
    with CurvatureProbe(make(nn.Hardsigmoid(), nn.Tanh())) as probe:
        for ask in (probe.hessian_diagonal, probe.estimate_cost):
            with pytest.raises(DoubleBackwardError, match="hardsigmoid"):
                ask(F.cross_entropy, *data())


@pytest.mark.parametrize(
    "how", [{"method": "exact"}, {"method": "hutchinson", "num_draws": 20}], ids=lambda how: how["method"]
)
@pytest.mark.parametrize(("width", "samples"), [(64, 64), (24, 8)])
def test_memory_that_is_told_is_that_which_is_spent(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], width: int, samples: int
) -> None:
    seed()
    for seconds in ("TRIAL_SECONDS", "METERED_SECONDS"):
        monkeypatch.setattr(f"secorder.oneshot.hessian.trials.{seconds}", 600.0)  # however slow the machine
    model = nn.Sequential(
        nn.Linear(50, width), nn.Tanh(), nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 5)
    )
    batch = torch.randn(samples, 50), torch.randint(5, (samples,))
    with CurvatureProbe(model, "all") as probe:
        told = probe.estimate_cost(F.cross_entropy, *batch, **how).num_bytes
        spent = peak_memory(lambda: probe.hessian_diagonal(F.cross_entropy, *batch, **how))
    assert told / 1.5 < spent < 1.5 * told


def test_trials_that_were_made_to_tell_are_neither_told_nor_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def learn(*args: Any, **how: Any) -> Any:
        made.append(how)
        time.sleep(0.2)
        return learn_seconds(*args, **how)

    for module in (cost_module, decision):
        monkeypatch.setattr(module, "learn_seconds", learn)
        monkeypatch.setattr(module, "matters", lambda found, budget: True)
    monkeypatch.setattr(timing, "SHORT_FORWARD", 1e3)
    model, batch = mlp(), data()
    with CurvatureProbe(model) as probe:
        assert probe.estimate_cost(F.cross_entropy, *batch, method="exact").overhead < 0.2
        assert len(made) == 2  # to choose, and how long that takes
        probe.hessian_diagonal(F.cross_entropy, *batch, method="exact")
        assert len(made) == 2
        for other in ({"method": "auto"}, {"method": "exact", "chunk_size": 3}):  # of which nothing was told
            made.clear()
            for _ in range(2):
                probe.hessian_diagonal(F.cross_entropy, *batch, **other)
            assert len(made) == 1


class Recomputed(nn.Module):
    """The first forward takes long, and a checkpoint runs a part of each once more."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.b, self.seconds = nn.Linear(4, 6), nn.Linear(6, 3), seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds())
        found: Tensor = self.b(checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=False))
        return found


def test_what_happens_the_first_time_alone_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for long in (cost_module.LONG, 0.0):
        monkeypatch.setattr(cost_module, "LONG", long)
        seconds = itertools.chain([0.5], itertools.repeat(0.0)).__next__
        with CurvatureProbe(Recomputed(seconds), "all", reduction="mean") as probe:
            told = probe.estimate_cost(F.cross_entropy, *data())
        assert told.overhead < 0.4
