"""Many classes: the heaviest columns of each sample and draws of the others, for Hessians and their traces."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.oneshot.hessian import column_draws
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.choice import choose
from secorder.oneshot.hessian.facts import Facts

from ...helpers import seed, seeded

N, C = 4, 120


def classifier(activation: nn.Module) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """Sure of few of its classes; the first layer has more outputs and parameters than there are draws."""
    seed()
    model = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 6), activation, nn.Linear(6, C)).double()
    with torch.no_grad():
        model[4].weight.mul_(5)
    return model, (torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % C)


def exact(model: nn.Module, batch: tuple[Tensor, Tensor], layer: str) -> Tensor:
    """The diagonal of the dense Hessian, flat."""
    parameters = {k: p.detach() for k, p in model.get_submodule(layer).named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        own = {f"{layer}.{name}": part.view_as(p) for (name, p), part in parts}
        return F.cross_entropy(torch.func.functional_call(model, own, (batch[0],)), batch[1])

    point = torch.cat([p.flatten() for p in parameters.values()])
    return torch.autograd.functional.hessian(loss, point, vectorize=True).diagonal()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("activation", "options", "strategies"),
    [
        (nn.ReLU(), {"num_draws": 40}, {"column-draws"}),
        (nn.ReLU(), {"rtol": 0.1, "num_draws": 20}, {"column-draws"}),
        (nn.Tanh(), {"num_draws": 40}, {"columns+output-draws", "output-draws"}),
    ],
)
def test_diagonals_are_unbiased_and_tell_their_errors(
    activation: nn.Module, options: dict[str, Any], strategies: set[str]
) -> None:
    model, batch = classifier(activation)
    expected = exact(model, batch, "0")
    with CurvatureProbe(model) as probe:
        found = [
            probe.hessian_diagonal(F.cross_entropy, *batch, method="hutchinson", generator=seeded(k), **options)
            for k in range(24)
        ]
    info = [d.info["0"] for d in found]
    assert {str(i.strategy) for i in info} <= strategies
    assert all(0 < i.num_draws < C for i in info)
    if "rtol" in options:
        assert all(i.converged and i.relative_error <= 0.1 for i in info)
    values, errors = (torch.stack(x) for x in zip(*((d["0"], d.standard_error["0"]) for d in found), strict=True))  # type: ignore[index]
    live = errors.mean(0) > 1e-9 * expected.abs().max()
    assert torch.allclose(values[:, ~live], expected[~live].expand(len(found), -1))
    z = ((values.mean(0) - expected) / (values.std(0) / len(found) ** 0.5))[live]
    assert z.square().mean() < 2.5
    assert 0.5 < (errors.square().mean(0) / values.var(0))[live].median() < 1.8
    assert torch.allclose(found[0]["4"], exact(model, batch, "4"))  # the head is exact


def test_traces_too() -> None:
    model, batch = classifier(nn.ReLU())
    with CurvatureProbe(model) as probe:
        expected = probe.hessian_trace(F.cross_entropy, *batch, method="exact")
        found = probe.hessian_trace(F.cross_entropy, *batch, method="hutchinson", rtol=0.1, generator=seeded())
    for name, trace in found.items():
        assert trace.converged
        assert abs(trace.value - expected[name].value) <= 5 * trace.standard_error + 1e-9
    assert found["0"].num_draws > 0
    assert found["4"].num_draws == 0


def test_their_cost_is_told() -> None:
    model, batch = classifier(nn.ReLU())
    with CurvatureProbe(model) as probe:
        cost = probe.estimate_cost(F.cross_entropy, *batch, method="hutchinson", num_draws=20)
        assert {name: str(c.strategy) for name, c in cost.items()} == {
            "0": "column-draws", "2": "column-draws", "4": "columns"
        }  # fmt: skip
        assert (cost["0"].num_hvps, cost["0"].seconds > 0) == (20, True)
        found = probe.hessian_diagonal(F.cross_entropy, *batch, method="hutchinson", num_draws=20)
    assert {name: i.strategy for name, i in found.info.items()} == {name: c.strategy for name, c in cost.items()}


FACTS: dict[str, Any] = {"own_use": True, "piecewise_linear": True, "num_columns": 1000, "outputs": 64}


@pytest.mark.parametrize(
    ("more", "budget", "strategy"),
    [
        ({"columns_drawn": True}, Budget("hutchinson"), "column-draws"),
        ({"columns_drawn": False, "samples_independent": True}, Budget("hutchinson"), "output-draws"),
        ({"columns_drawn": True}, Budget("hutchinson", num_draws=1000), "columns"),
        ({"columns_drawn": True, "last": True}, Budget("hutchinson"), "columns"),
        ({"columns_drawn": True}, Budget("auto", max_hvps=10), "column-draws"),
        ({"columns_drawn": True}, Budget("exact"), "parameter-basis"),
    ],
)
def test_they_are_chosen_where_columns_are_too_many(more: dict[str, Any], budget: Budget, strategy: str) -> None:
    facts = Facts("0", 300, **FACTS, **more)
    assert choose([facts], budget)["0"].strategy == strategy
    assert column_draws.products(facts, budget) == min(1000, budget.num_draws)
