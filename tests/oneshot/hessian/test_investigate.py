"""The facts about layers, found out by one run of the model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.investigate import facts, investigate
from secorder.oneshot.recording import recorded

from ...helpers import Fn, Net, Twice, data, make, measured


def mixes(h: Tensor) -> Tensor:
    return h + 0.1 * h.flip(0).tanh()


def outside(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x))) + F.linear(x, m.a.weight)[:, :3]


MODELS: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "tanh": (make, {"0": {"own_use": True, "samples_independent": True, "piecewise_linear": False}}),
    "relu": (lambda: make(nn.ReLU()), {"0": {"own_use": True, "piecewise_linear": True, "num_columns": 2}}),
    "coupled": (lambda: make(Fn(mixes)), {"0": {"own_use": True, "samples_independent": False}}),
    "twice": (Twice, {"a": {"own_use": False}, "b": {"own_use": True}}),
    "outside": (lambda: Net(outside, a=nn.Linear(4, 4), b=nn.Linear(4, 3)), {"a": {"own_use": False}}),
    "unused": (lambda: Net(lambda m, x: m.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 3)), {"a": {"used": False}}),
}


@pytest.mark.parametrize("name", MODELS)
def test_facts(name: str) -> None:
    build, expected = MODELS[name]
    found = measured(facts, build(), data())
    for layer, wanted in expected.items():
        assert {key: getattr(found[layer], key) for key in wanted} == wanted, layer


def test_sizes() -> None:
    found = measured(facts, make(), data())["0"]
    assert (found.numel, found.outputs, found.passed, found.passed_by_column) == (25, 5, 6 * (5 + 3 + 3), 18)


def test_what_cannot_matter_is_not_looked_at() -> None:
    def work(task: Any) -> Any:
        with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
            return investigate(task, recording, Budget("hutchinson"), columns=False)

    found = measured(work, make(nn.ReLU()), data())
    assert found.output_side is None
    assert all(fact.piecewise_linear is None for fact in found.facts.values())
