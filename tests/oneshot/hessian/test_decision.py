"""When products are timed, and that what was told of their seconds decides."""

import dataclasses
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.oneshot import timing
from secorder.oneshot.hessian import cost, decision, trials
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.decision import matters
from secorder.oneshot.hessian.facts import Facts
from secorder.oneshot.hessian.investigate import Findings

from ...helpers import seed
from ...reference import assert_all_close, hessian_by_element


def test_little_work_is_not_timed() -> None:
    facts = Facts("a", numel=1000, outputs=100)
    found = Findings({"a": facts}, {})
    found.seconds = 1.0
    auto = Budget.checked("auto", None, None, None, None)
    assert matters(found, auto)
    assert not matters(found, Budget("hutchinson"))
    assert not matters(found, Budget())  # the basis of the parameters is all that there is
    independent = dataclasses.replace(facts, own_use=True, samples_independent=True, outputs=500)
    found.facts["a"] = independent
    assert matters(found, Budget())
    found.facts["a"] = dataclasses.replace(independent, outputs=100)
    assert not matters(found, Budget())
    found.facts["a"] = dataclasses.replace(facts, last=True)
    assert not matters(found, auto)


def test_columns_are_those_of_all_layers_together() -> None:
    """Two columns for a hundred layers are little work, however many outputs z has."""
    facts = [Facts(str(k), 1000, True, True, 100, True, True, num_columns=2, seconds_by_column=0.1) for k in range(100)]
    found = Findings({f.layer: f for f in facts}, {})
    found.seconds = 0.01
    auto = Budget.checked("auto", None, None, None, None)
    assert not matters(found, auto)
    found.seconds = 1.0
    assert matters(found, auto)


class LastStep(nn.Module):
    """A recurrent layer, of which the parameters have a basis alone."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.core(x)[0][:, -1])
        return found


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.LayerNorm(2), nn.Linear(2, 2))


def relu() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


MODELS: dict[Any, tuple[int, ...]] = {LastStep: (5, 4, 3), convolutions: (5, 1, 3, 3), relu: (5, 6), chain: (5, 6)}


@pytest.mark.parametrize("make_model", MODELS, ids=lambda make_model: make_model.__name__)
def test_what_was_told_is_what_is_done_however_long_products_take(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[[], nn.Module]
) -> None:
    """Seconds that are never the same twice: each call of one product takes next to nothing, or more than there is."""
    seed()
    noise, batch = random.Random(0), (torch.randn(MODELS[make_model]), torch.randint(2, (5,)))
    model = make_model()

    def seconds(*_: Any) -> float:
        return noise.choice([1e-6, 0.1, 1e3])

    def by_layer(_: Any, chain: Any) -> dict[str, float]:
        return {graph.layer.name: seconds() for graph in chain.graphs.values()}

    for module in (decision, trials):
        monkeypatch.setattr(module, "LONG_WORK", 0)
    monkeypatch.setattr(trials, "TRIAL_SECONDS", 0.01)
    monkeypatch.setattr(trials, "seconds_per_product", seconds)
    monkeypatch.setattr(trials, "seconds_of_chain", by_layer)
    monkeypatch.setattr(cost, "seconds_of_chain", by_layer)
    monkeypatch.setattr(decision, "FORWARDS", 1e6)
    monkeypatch.setattr(timing, "SHORT_FORWARD", 1e3)
    exact = hessian_by_element(model, F.cross_entropy, *batch)
    seen = set()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(8):
            told = probe.estimate_cost(F.cross_entropy, *batch)
            for measure in (probe.hessian_diagonal, probe.hessian_diagonal):
                found = measure(F.cross_entropy, *batch, method="auto")
                ways = {name: str(i.strategy).split("+")[-1] for name, i in found.info.items()}
                assert ways == {name: str(c.strategy) for name, c in told.items()}
                by_parameter = found.by_parameter()
                sure = [p for p in exact if "draws" not in ways[p.rpartition(".")[0]]]
                assert_all_close({p: by_parameter[p] for p in sure}, {p: exact[p] for p in sure})
            seen.add(tuple(ways.values()))
    assert len(seen) > 1  # which is not what would have been chosen anyway


def test_what_was_told_does_not_hold_where_a_forward_takes_another_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two losses of one name, the products of one may take many times as long."""
    made, now = [], 0.0
    monkeypatch.setattr(decision, "matters", lambda found, budget: True)
    monkeypatch.setattr(decision, "learn_seconds", lambda *_: made.append(None))
    monkeypatch.setattr(time, "perf_counter", lambda: now)  # a busy machine has no part in it

    def loss(seconds: float, output: Tensor, targets: Tensor) -> Tensor:
        nonlocal now
        now += seconds
        return F.cross_entropy(output, targets)

    counts = []
    with CurvatureProbe(relu(), "all", reduction="mean") as probe:
        for seconds in (0.001, 0.1, 0.1, 0.001):
            probe.hessian_diagonal(partial(loss, seconds), torch.randn(5, 6), torch.randint(2, (5,)))
            counts.append(len(made))
    assert counts == [1, 2, 2, 3]
