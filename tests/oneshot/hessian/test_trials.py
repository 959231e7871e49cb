"""Which layers are timed, and what is learnt of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import CurvatureProbe
from secorder.layers.selection import select_layers
from secorder.oneshot.hessian import column_draws, decision, deflation, output_draws, trials
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.choice import DRAWN, choose
from secorder.oneshot.hessian.estimate import Estimate
from secorder.oneshot.hessian.facts import Facts
from secorder.oneshot.hessian.investigate import investigate
from secorder.oneshot.hessian.output_draws import whole
from secorder.oneshot.hessian.trials import learn_seconds
from secorder.oneshot.measurement import Measurement, measure
from secorder.oneshot.recording import recorded

from ...helpers import data, make, mlp
from ...reference import assert_all_close, hessian_by_element


@pytest.mark.usefixtures("no_chain")
@pytest.mark.parametrize("make_model", [mlp, lambda: make(nn.ReLU()), lambda: make(nn.BatchNorm1d(5), nn.Tanh())])
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_seconds_are_learnt_of_what_is_chosen(make_model: object, method: str) -> None:
    assert callable(make_model)
    model, (x, y) = make_model(), data()
    budget = Budget(method, num_draws=3)  # type: ignore[arg-type]

    def work(task: Measurement) -> tuple[dict[str, Facts], dict[str, float]]:
        with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
            found = investigate(task, recording, budget, columns=True)
            return found.facts, learn_seconds(task, found, budget, recording, draws=whole)

    facts, expected = measure(work, model, select_layers(model, None), F.cross_entropy, x, y, by_sample=False)
    assert max(facts["0"].seconds_by_draw, facts["0"].seconds_by_column, expected.get("0", 0.0)) > 0
    chosen = choose(list(facts.values()), budget)
    assert set(expected) == {name for name, choice in chosen.items() if choice.strategy in (s.NAME for s in DRAWN)}
    assert all(0 < seconds < math.inf for seconds in expected.values())


@pytest.mark.parametrize(("limit", "seconds"), [(math.inf, 1.6 + 0.1 * (16 / 0.03 - 16)), (10.0, 10.0)])
def test_how_many_draws_there_will_be(monkeypatch: pytest.MonkeyPatch, limit: float, seconds: float) -> None:
    """By the error of the first ones, which is in their own norm too."""

    def work(budget: Budget, seconds: float) -> list[Estimate]:
        return [Estimate([torch.tensor([2.0])], [torch.tensor([1.0])], 16, converged=False)]

    def timed(run: Callable[[], object]) -> float:
        run()
        return 1.6

    monkeypatch.setattr(trials, "seconds_of", timed)
    found = trials._seconds_of_draws(work, Budget("hutchinson", 16, rtol=0.1), limit, 100.0)
    assert found == (pytest.approx(0.1), pytest.approx(seconds))
    assert trials._seconds_of_draws(work, Budget("hutchinson", 100), limit, 100.0)[1] == pytest.approx(10.0)


@pytest.mark.parametrize(("rtol", "made"), [(None, [1, 2]), (0.1, [1, 2])])
def test_of_draws_that_take_long_a_few_are_made(
    monkeypatch: pytest.MonkeyPatch, rtol: float | None, made: list[int]
) -> None:
    """Two tell what all take, of which there are as many as the budget asks for at least."""
    now, runs = [0.0], []

    def work(budget: Budget, seconds: float) -> list[Estimate]:
        now[0] += 5.0 * budget.num_draws
        runs.append(budget.num_draws)
        return [Estimate([torch.tensor([2.0])], [torch.tensor([0.1])], budget.num_draws)]

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    found = trials._seconds_of_draws(work, Budget("hutchinson", 16, rtol=rtol), math.inf, 0.5)
    assert found == (pytest.approx(5.0), pytest.approx(16 * 5.0))
    assert runs == made


def test_what_each_run_does_besides_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes a second, each draw a tenth of one."""
    now, runs = [0.0], []

    def work(budget: Budget, seconds: float) -> list[Estimate]:
        now[0] += 1.0 + 0.1 * budget.num_draws
        runs.append(budget.num_draws)
        return []

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    by_draw, seconds = trials._seconds_of_draws(work, Budget("hutchinson", 60), math.inf, 1000.0)
    assert (by_draw, seconds) == (pytest.approx(0.1), pytest.approx(1.0 + 6.0))


def seconds_told(draws: int, task: Measurement) -> dict[str, float]:
    """The seconds of each layer that so many draws are told to take."""
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        budget = Budget("hutchinson", num_draws=draws)
        found = investigate(task, recording, budget, columns=True)
        return learn_seconds(task, found, budget, recording, draws=whole)


@pytest.mark.parametrize(("draws", "more"), [(20, 2), (8, 0)])
def test_draws_that_are_made_to_decide_by_count_too(monkeypatch: pytest.MonkeyPatch, draws: int, more: int) -> None:
    """Those of the whole and of what the Gauss-Newton part leaves, and that part's columns: as the measurement does."""
    model, (x, y), made = mlp(), data(), []

    def pilot(*args: Any) -> Any:
        made.append(deflation.PILOT_DRAWS)
        return deflation.pilot(*args)

    monkeypatch.setattr(output_draws, "pilot", pilot)
    layers = select_layers(model, None)
    with CurvatureProbe(model) as probe:
        probe.hessian_diagonal(F.cross_entropy, x, y, method="hutchinson", num_draws=draws)
    monkeypatch.setattr(
        trials, "_seconds_of_draws", lambda work, budget, limit, allowance: (1.0, float(budget.num_draws))
    )
    monkeypatch.setattr(trials, "_of_columns", lambda task, side, graphs: (abs, len(graphs)))
    monkeypatch.setattr(trials, "seconds_per_product", lambda trial, most, allowance: most if trial is abs else 1.0)
    expected = measure(partial(seconds_told, draws), model, layers, F.cross_entropy, x, y, by_sample=False)
    assert expected
    assert set(expected.values()) == {draws + more * deflation.PILOT_DRAWS + 2}
    assert sum(made) == more * deflation.PILOT_DRAWS * len(expected)


def test_a_trial_of_columns_leaves_what_was_verified() -> None:
    """Where a layer is narrower than the outputs, its products are timed after columns, by what is known of rows."""
    model = nn.Sequential(nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 100))
    x, t = torch.randn(4, 100), torch.randn(4, 100)
    with CurvatureProbe(model) as probe:
        cost = probe.estimate_cost(F.mse_loss, x, t, max_hvps=50)
        hessian = probe.hessian_diagonal(F.mse_loss, x, t, max_hvps=50)
    assert cost["0"].strategy == hessian.info["0"].strategy == "output-basis"


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_a_layer_that_a_checkpoint_calls_twice_is_timed_as_it_runs(method: Any) -> None:
    """In trials of products on the parameters, whose forward is not recorded, nor are its parts that run again."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def inner(self, x: Tensor) -> Tensor:
            return self.b(self.b(x).tanh()).tanh()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.inner, self.a(x).tanh(), use_reentrant=False)
            return self.c(found)

    model, x, y = Twice(), torch.randn(8, 4), torch.arange(8) % 3
    with CurvatureProbe(model) as probe:
        cost = probe.estimate_cost(F.cross_entropy, x, y, method=method)
        info = probe.hessian_diagonal(F.cross_entropy, x, y, method=method).info
    assert cost["b"].strategy == info["b"].strategy
    assert str(cost["b"].strategy).startswith("parameter")
    assert cost["b"].seconds > 0


@pytest.mark.usefixtures("no_chain")
@pytest.mark.parametrize(("draws", "expected"), [(6, 1.0 + 7.0 / 2), (12, 1.0 + 8 * 0.1)])
def test_columns_that_are_drawn_beside_draws_are_told(
    monkeypatch: pytest.MonkeyPatch, draws: int, expected: float
) -> None:
    """As they run: the heaviest and draws of the rest, for all layers; all columns, and pilots, where they are few."""

    def seconds_of_draws(work: Any, budget: Budget, limit: float, allowance: float) -> tuple[float, float]:
        work(budget, limit)
        return 0.1, 7.0 if getattr(work, "func", None) is column_draws.run else 1.0

    monkeypatch.setattr(trials, "_seconds_of_draws", seconds_of_draws)
    monkeypatch.setattr(trials, "seconds_per_product", lambda *_: 0.0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 12))
    x, y = torch.randn(6, 3), torch.randint(12, (6,))
    layers = select_layers(model, None)
    found = measure(partial(seconds_told, draws), model, layers, F.cross_entropy, x, y, by_sample=False)
    assert {name: found[name] for name in ("0", "2")} == dict.fromkeys(("0", "2"), pytest.approx(expected))


def test_a_chain_that_takes_long_is_held_against_what_may_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """By clocks on which it takes a second to each layer, or none at all."""
    model, x, y = mlp(), *data()
    exact = hessian_by_element(model, F.cross_entropy, x, y)
    for module in (decision, trials):
        monkeypatch.setattr(module, "LONG_WORK", 0)
    for seconds, strategy in ((1e3, "output-basis"), (0.5, "chain")):
        monkeypatch.setattr(trials, "seconds_of_chain", lambda task, chain: dict.fromkeys("024", seconds))  # noqa: B023
        monkeypatch.setattr(trials, "seconds_per_product", lambda trial, most, allowance: trial(1) or 1.0)
        with CurvatureProbe(model) as probe:
            cost = probe.estimate_cost(F.cross_entropy, x, y, method="exact")
            found = probe.hessian_diagonal(F.cross_entropy, x, y, method="exact")
        assert {found.info[name].strategy for name in "02"} == {strategy}
        assert {name: i.strategy for name, i in found.info.items()} == {name: c.strategy for name, c in cost.items()}
        assert_all_close(found.by_parameter(), exact)


def test_a_chain_that_fails_when_it_is_timed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        return torch.ones(2) @ torch.ones(3)

    model, x, y = mlp(), *data()
    for module in (decision, trials):
        monkeypatch.setattr(module, "LONG_WORK", 0)
    monkeypatch.setattr(trials, "seconds_of_chain", fails)
    with CurvatureProbe(model) as probe:
        found = probe.hessian_diagonal(F.cross_entropy, x, y, method="exact")
    assert "chain" not in {info.strategy for info in found.info.values()}
    assert_all_close(found.by_parameter(), hessian_by_element(model, F.cross_entropy, x, y))


def test_draws_of_layers_that_are_not_tried_take_as_much_longer_as_their_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, y, tried = mlp(), *data(), []

    def one_alone(kinds: Any, tell: Any, most: float = 0.0, **_: bool) -> dict[str, tuple[Any, str]]:
        first = next(iter(kinds), "")
        return {name: (tell(first), first) for name in kinds}

    def products(trial: Any, most: int, allowance: float) -> float:
        tried.append(trial)
        return float(len(tried))

    monkeypatch.setattr(trials, "seconds_per_product", products)
    layers = select_layers(model, None)
    told: dict[str, dict[str, float]] = {}

    def work(task: Measurement) -> dict[str, float]:
        with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
            budget = Budget("auto", num_draws=2, max_hvps=0)
            found = investigate(task, recording, budget, columns=False)
            learn_seconds(task, found, budget, recording, draws=whole)  # which times the products of each
            monkeypatch.setattr(trials, "of_nearest", one_alone)
            monkeypatch.setattr(trials, "_seconds_of_draws", lambda *_: (0.5, 5.0))
            told["seconds"] = {name: f.seconds for name, f in found.facts.items()}
            return learn_seconds(task, found, budget, recording, draws=whole)

    drawn = measure(work, model, layers, F.cross_entropy, x, y, by_sample=False)
    first = told["seconds"][layers[0].name]
    assert drawn == {name: pytest.approx(5.0 * told["seconds"][name] / first) for name in drawn}
    assert len(set(drawn.values())) == len(drawn) > 1


@pytest.mark.usefixtures("no_chain")
def test_products_of_layers_that_are_not_tried_take_as_much_longer_as_more_comes_after_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "of_nearest", lambda kinds, tell, most=0.0: {name: (tell("2"), "2") for name in kinds})
    monkeypatch.setattr(trials, "seconds_per_product", lambda *_: 3.0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))

    def work(task: Measurement) -> dict[str, Facts]:
        with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
            budget = Budget("auto", num_draws=2, max_hvps=0, max_seconds=1.0)
            found = investigate(task, recording, budget, columns=False)
            learn_seconds(task, found, budget, recording)
            return found.facts

    batch = torch.randn(6, 5), torch.arange(6) % 2
    facts = measure(work, model, select_layers(model, None), F.cross_entropy, *batch, by_sample=False)
    assert [f.passed // 6 for f in facts.values()] == [8 + 4 + 2 + 2, 4 + 2 + 2, 2 + 2]  # and the output
    assert [f.seconds for f in facts.values()] == pytest.approx([3.0 * 16 / 8, 3.0, 3.0 * 4 / 8])
