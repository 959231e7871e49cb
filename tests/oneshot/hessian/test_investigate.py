"""The facts about layers, found out by one run of the model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.investigate import Findings, facts, investigate, verify_samples
from secorder.oneshot.measurement import Measurement
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


def investigated(task: Any) -> Findings:
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        return investigate(task, recording, Budget("exact"), columns=True)


LOSSES: dict[str, tuple[Any, float | None]] = {
    "mean": (lambda: F.cross_entropy, 1 / 6),
    "sum": (lambda: nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2), 1.0),
    "weighted": (lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), None),
    "a label that does not count": (lambda: nn.CrossEntropyLoss(ignore_index=0), None),
    "of the user's": (lambda: lambda output, targets: F.cross_entropy(output, targets) * 2, None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_losss_hessian_is_told_by_definition_of_plain_cross_entropies_alone(name: str) -> None:
    build, scale = LOSSES[name]
    inputs, _ = data()
    side = measured(investigated, make(), (inputs, torch.arange(6) % 3), loss_fn=build()).separate
    assert side is not None
    assert side.scale == (None if scale is None else pytest.approx(scale))


def test_gradients_to_be_differentiated_are_taken_where_products_are() -> None:
    def work(task: Any) -> tuple[list[bool], list[bool]]:
        found = investigated(task)
        before = [g is None for g in found.graphs["0"].output_gradients]
        found.learn("0", chain_depth=0)  # as where the chain fails
        verify_samples(task, found, Budget("exact"))
        return before, [g is None for g in found.graphs["0"].output_gradients]

    assert measured(work, make(), data()) == ([True], [False])


@pytest.mark.parametrize(("steps", "together"), [(1, False), (64, True)])
def test_products_through_many_short_operations_are_not_made_alone(steps: int, together: bool) -> None:
    """The same numbers, in one operation or as the steps of a recurrent cell."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.a(part).tanh() for part in x.chunk(steps, 1)]).mean(0)

    def work(task: Measurement) -> int:
        facts(task)
        return task.products_at_once(1 << 17, torch.zeros(1, dtype=torch.float64))

    model, x = Net(forward, a=nn.Linear(256 // steps, 64 // steps)), torch.randn(512, 256)
    at_once = measured(work, model, (x, torch.zeros(512, 64 // steps)), loss_fn=F.mse_loss)
    assert (at_once > 1) == together
