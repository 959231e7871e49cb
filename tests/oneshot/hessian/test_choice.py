"""The choice is a pure function of facts and a budget."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secorder import CurvatureProbe, CurvatureWarning, InvalidArgumentError, Strategy
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.choice import choose
from secorder.oneshot.hessian.estimate import average
from secorder.oneshot.hessian.facts import Facts

from ...helpers import make, mlp, seeded
from ...reference import assert_all_close, assert_close, hessian_by_element

BASIS = Budget("exact")
FREE = Facts("a", numel=40, own_use=True, outputs=5, samples_independent=True, passed=100, passed_by_column=10)
LINEAR = dataclasses.replace(FREE, piecewise_linear=True, num_columns=3)

TIMED = Budget("auto", num_draws=16, max_hvps=100, max_seconds=2.0)

CHOICES: dict[str, tuple[list[Facts], Budget, dict[str, tuple[str, int]]]] = {
    "basis_of_outputs": ([FREE], BASIS, {"a": ("output-basis", 5)}),
    "fewer_parameters": ([dataclasses.replace(FREE, numel=4)], BASIS, {"a": ("parameter-basis", 4)}),
    "chain_to_the_output": (
        [dataclasses.replace(FREE, chain_depth=1, basis_work=1)],
        BASIS,
        {"a": ("chain", 0)},
    ),
    "many_positions_of_the_output": (
        [dataclasses.replace(FREE, chain_depth=1, basis_work=1, outputs=50)],
        BASIS,
        {"a": ("parameter-basis", 40)},
    ),
    "coupled": (
        [dataclasses.replace(FREE, samples_independent=False)],
        BASIS,
        {"a": ("parameter-basis", 40)},
    ),
    "used_outside": ([dataclasses.replace(LINEAR, own_use=False)], BASIS, {"a": ("parameter-basis", 40)}),
    "columns": ([LINEAR], BASIS, {"a": ("columns", 3)}),
    "too_many_columns": ([dataclasses.replace(LINEAR, num_columns=6)], BASIS, {"a": ("output-basis", 5)}),
    "columns_that_serve_two": (
        [dataclasses.replace(LINEAR, layer=name, num_columns=6) for name in "ab"],
        BASIS,
        {"a": ("columns", 6), "b": ("columns", 6)},
    ),
    "one_is_not_linear": (
        [LINEAR, dataclasses.replace(FREE, layer="b", num_columns=3, piecewise_linear=False)],
        BASIS,
        {"a": ("columns", 3), "b": ("output-basis", 5)},
    ),
    "unused": ([dataclasses.replace(LINEAR, used=False)], Budget("hutchinson"), {"a": ("unused", 0)}),
    "draws": ([FREE], Budget("hutchinson", num_draws=7), {"a": ("output-draws", 7)}),
    "draws_on_parameters": (
        [dataclasses.replace(FREE, samples_independent=False)],
        Budget("hutchinson", num_draws=7),
        {"a": ("parameter-draws", 7)},
    ),
    "columns_cheaper_than_draws": ([LINEAR], Budget("hutchinson", num_draws=7), {"a": ("columns", 3)}),
    "affordable": ([FREE], Budget("auto", max_hvps=5), {"a": ("output-basis", 5)}),
    "not_affordable": ([FREE], Budget("auto", num_draws=16, max_hvps=4), {"a": ("output-draws", 16)}),
    "affordable_in_seconds": ([dataclasses.replace(FREE, seconds=0.3)], TIMED, {"a": ("output-basis", 5)}),
    "too_many_seconds": ([dataclasses.replace(FREE, seconds=0.5)], TIMED, {"a": ("output-draws", 16)}),
    "too_many_seconds_in_all": (
        [dataclasses.replace(FREE, layer=name, seconds=s) for name, s in zip("abc", (0.3, 0.1, 0.15), strict=True)],
        TIMED,
        {"a": ("output-draws", 16), "b": ("output-basis", 5), "c": ("output-draws", 16)},
    ),
    "the_fastest_of_those_that_were_timed": (
        [dataclasses.replace(FREE, numel=4, seconds=0.1, seconds_on_parameters=0.2)],
        BASIS,
        {"a": ("output-basis", 5)},
    ),
    "one_alone_was_timed": (
        [dataclasses.replace(FREE, numel=4, seconds=0.1)],
        BASIS,
        {"a": ("parameter-basis", 4)},
    ),
    "chain_slower_than_others": (
        [dataclasses.replace(FREE, chain_depth=1, chain_products=5, basis_work=9, chain_seconds=0.6, seconds=0.1)],
        BASIS,
        {"a": ("output-basis", 5)},
    ),
    "chain_as_far_as_it_is_faster": (
        [
            dataclasses.replace(FREE, layer="a", chain_depth=1, chain_products=5, chain_seconds=0.4, seconds=0.1),
            dataclasses.replace(FREE, layer="b", chain_depth=2, chain_products=5, chain_seconds=0.1, seconds=0.1),
            dataclasses.replace(FREE, layer="c", chain_depth=3, chain_products=5, chain_seconds=0.6, seconds=0.1),
            dataclasses.replace(FREE, layer="d", chain_depth=4, chain_products=5, basis_work=10**9),
        ],
        BASIS,
        {"a": ("chain", 5), "b": ("chain", 5), "c": ("output-basis", 5), "d": ("output-basis", 5)},
    ),
    "chain_takes_too_long": (
        [dataclasses.replace(FREE, chain_depth=1, chain_products=5, chain_seconds=2.1, seconds=0.5)],
        TIMED,
        {"a": ("output-draws", 16)},
    ),
    "wide_output_alone_is_no_chain": (
        [dataclasses.replace(FREE, chain_depth=1, basis_work=1, outputs=30, numel=100)],
        BASIS,
        {"a": ("output-basis", 30)},
    ),
    "columns_take_too_long": (
        [dataclasses.replace(LINEAR, seconds=0.01, seconds_by_column=0.7)],
        TIMED,
        {"a": ("output-basis", 5)},
    ),
    "columns_of_all_take_too_long": (
        [
            dataclasses.replace(LINEAR, layer="a", seconds_by_column=0.4),
            dataclasses.replace(FREE, layer="b", seconds=0.19),
        ],
        TIMED,
        {"a": ("output-draws", 16), "b": ("output-basis", 5)},
    ),
    "a_head_takes_no_column": (
        [dataclasses.replace(LINEAR, last=True, num_columns=10**6)],
        TIMED,
        {"a": ("columns", 0)},
    ),
    "too_much_work": ([FREE], Budget("auto", num_draws=16, max_hvps=5, max_work=499), {"a": ("output-draws", 16)}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    facts, budget, expected = CHOICES[name]
    before = [dataclasses.asdict(f) for f in facts]
    chosen = choose(facts, budget)
    assert {layer: (c.strategy, c.products) for layer, c in chosen.items()} == expected
    assert choose(facts, budget) == chosen
    assert [dataclasses.asdict(f) for f in facts] == before
    assert str(chosen["a"].strategy) in repr(chosen["a"])


def test_strategies_print_as_their_strings() -> None:
    assert str(Strategy.OUTPUT_BASIS) == f"{Strategy.OUTPUT_BASIS}" == Strategy.OUTPUT_BASIS == "output-basis"
    assert repr((Strategy.COLUMNS,)) == "('columns',)"
    assert f"{Strategy.RULE:>6}" == "  rule"


MODELS = {"smooth": mlp, "relu": lambda: make(nn.ReLU()), "coupled": lambda: make(nn.BatchNorm1d(5), nn.Tanh())}


OPTIONS: list[dict[str, Any]] = [{}, {"method": "hutchinson", "num_draws": 4}, {"max_hvps": 3, "num_draws": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::secorder.CurvatureWarning")
def test_the_cost_is_that_of_what_runs(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("decision", "cost"):  # by numbers of products, however slow the machine
        monkeypatch.setattr(f"secorder.oneshot.hessian.{module}.matters", lambda found, budget: False)
    model, x, y = MODELS[name](), torch.randn(6, 4), torch.randint(3, (6,))
    with CurvatureProbe(model, "all") as probe:
        cost = probe.estimate_cost(F.cross_entropy, x, y, **options)
        info = probe.hessian_diagonal(F.cross_entropy, x, y, **options).info
        trace = probe.estimate_cost(F.cross_entropy, x, y, quantity="trace", **options)
        for layer, c in cost.items():
            assert c.strategy == info[layer].strategy or info[layer].strategy == "columns+output-draws"
            assert c.num_hvps <= info[layer].num_hvps <= c.num_hvps + 24
            assert dataclasses.replace(trace[layer], num_bytes=c.num_bytes) == c  # of which less is kept
        values = probe.hessian_eigenvalues(F.cross_entropy, x, y, max_iterations=9, tolerance=1e-12)
        cost = probe.estimate_cost(F.cross_entropy, x, y, quantity="eigenvalues", max_iterations=9)
        for layer, c in cost.items():
            assert values[layer].num_hvps <= c.num_hvps
        if name == "coupled":
            return
        for kind in ("empirical", "type-2", "mc"):
            how: dict[str, Any] = {"fisher_type": kind, **({"num_draws": 4} if kind == "mc" else {})}
            cost = probe.estimate_cost(F.cross_entropy, x, y, quantity="fisher", **how)
            info = probe.fisher_diagonal(F.cross_entropy, x, y, **how).info
            assert {layer: c.strategy for layer, c in cost.items()} == {k: i.strategy for k, i in info.items()}


def test_estimates_that_are_bad_do_not_pass_for_converged() -> None:
    model, x, y = make(nn.BatchNorm1d(5), nn.Tanh()), torch.randn(6, 4), torch.randint(3, (6,))
    with CurvatureProbe(model) as probe:
        told = [
            info
            for k in range(8)
            for info in probe.hessian_diagonal(
                F.cross_entropy, x, y, method="hutchinson", num_draws=2, generator=seeded(k)
            ).info.values()
        ]
        assert any(i.relative_error > 0.5 for i in told)
        assert all(i.converged == (i.relative_error <= 0.5) for i in told)
        good = probe.hessian_diagonal(F.cross_entropy, x, y, method="hutchinson", num_draws=4000)
        assert all(i.converged for i in good.info.values())


def test_draws_stop_when_time_is_over() -> None:
    """But for the least number."""
    budget = Budget("auto", num_draws=16, rtol=1e-9, max_draws=1000)
    draw = lambda count: [torch.randn(count, 1)]  # noqa: E731
    for seconds, expected in ((0.0, 16), (1e9, 1000)):
        found = average(draw, [torch.zeros(1)], budget, 50, lambda _: None, seconds=seconds)
        assert (found.num_draws, found.converged) == (expected, False)


def test_the_whole_cost() -> None:
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(3, (6,))
    loader = DataLoader(TensorDataset(x, y), 2)
    with CurvatureProbe(model) as probe:
        for quantity in ("hessian", "trace", "eigenvalues", "fisher"):
            how = {"fisher_type": "type-2"} if quantity == "fisher" else {}
            cost = probe.estimate_cost(F.cross_entropy, x, y, quantity=quantity, **how)
            assert cost.seconds == pytest.approx(cost.overhead + sum(c.seconds for c in cost.values()))
            assert cost.overhead > 0
            assert cost["0"].seconds > 0 or quantity == "fisher"  # the difference of two trials
            assert cost.num_bytes == cost.base_bytes + max(c.num_bytes for c in cost.values())
            assert f"{cost.seconds:.3g} s" in repr(cost)
        cost = probe.estimate_cost(F.cross_entropy, loader)
        assert (cost.num_batches, cost.seconds) == (3, 3 * (cost.overhead + sum(c.seconds for c in cost.values())))
        with pytest.raises(InvalidArgumentError, match="number of batches"):
            probe.estimate_cost(F.cross_entropy, iter(loader))


@pytest.mark.usefixtures("no_chain")
def test_what_takes_long_is_timed_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which every product takes a second."""
    monkeypatch.setattr(
        "secorder.oneshot.hessian.trials.seconds_per_product", lambda trial, most, allowance: trial(1) or 1.0
    )
    monkeypatch.setattr("secorder.oneshot.hessian.decision.matters", lambda found, budget: True)
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(3, (6,))
    exact = hessian_by_element(model, F.cross_entropy, x, y)
    with CurvatureProbe(model, "all") as probe, pytest.warns(CurvatureWarning, match="1 of 3"):
        found = probe.hessian_diagonal(F.cross_entropy, x, y, generator=seeded())
    assert {k: i.strategy for k, i in found.info.items()} == {"0": "output-draws", "2": "output-basis", "4": "columns"}
    for name in ("2.weight", "4.weight"):
        assert_close(found[name], exact[name])
    relu = make(nn.ReLU())
    with CurvatureProbe(relu) as probe:
        found = probe.hessian_diagonal(F.cross_entropy, x, y, generator=seeded())
    assert {i.strategy for i in found.info.values()} == {"columns"}
    assert_all_close(found.by_parameter(), hessian_by_element(relu, F.cross_entropy, x, y))


def test_a_user_can_choose() -> None:
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(3, (6,))
    with CurvatureProbe(model) as probe:
        facts = probe.hessian_facts(F.cross_entropy, x, y)
        chosen = choose(list(facts.values()), Budget("exact"))
        info = probe.hessian_diagonal(F.cross_entropy, x, y, method="exact").info
    assert {name: c.strategy for name, c in chosen.items()} == {name: i.strategy for name, i in info.items()}
    assert "piecewise_linear=True" in repr(facts["4"])
