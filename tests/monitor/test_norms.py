"""Norms of gradients, weights and updates, against numbers by hand."""

import pytest
import torch
import torch.nn.functional as F

from secorder import CurvatureProbe
from secorder.monitor.norms import Norms

from ..helpers import data, make, step


def test_norms_of_a_step() -> None:
    model, batch = make(), data()
    layers = {"0": list(model[0].parameters()), "2": list(model[2].parameters())}
    norms = Norms(lambda: layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = {name: [p.detach().clone() for p in group] for name, group in layers.items()}
    norms.copy_weights()
    step(model, batch)
    optimizer.step()
    found = norms.numbers()

    def norm(*groups: list[torch.Tensor]) -> float:
        return torch.cat([t.flatten() for group in groups for t in group]).norm().item()

    for name, group in layers.items():
        moved = [now.detach() - old for now, old in zip(group, before[name], strict=True)]
        assert found["gradient_norm"][name] == pytest.approx(norm([p.grad for p in group]))  # type: ignore[misc]
        assert found["weight_norm"][name] == pytest.approx(norm([p.detach() for p in group]))
        assert found["update_to_weight"][name] == pytest.approx(norm(moved) / norm([p.detach() for p in group]))
    whole = norm(*([p.grad for p in group] for group in layers.values()))  # type: ignore[misc]
    assert found["model"]["gradient_norm"] == pytest.approx(whole)
    assert "update_to_weight" not in norms.numbers()  # no weights were kept from one step before


def test_gradients_that_are_gone_and_parameters_that_are_shared() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    norms = Norms(lambda: {"a": [weight], "b": [weight]})
    assert norms.numbers()["gradient_norm"] == {}
    F.mse_loss(weight, torch.zeros(2)).backward()
    norms.see_gradients()
    weight.grad = None
    found = norms.numbers()
    assert found["gradient_norm"] == {"a": 5.0, "b": 5.0}
    assert found["model"] == {"gradient_norm": 5.0, "weight_norm": 5.0}


def test_parameters_that_are_exchanged_are_looked_at_and_a_layer_that_is_gone_is_not() -> None:
    model = make()
    with CurvatureProbe(model, reduction="mean") as probe:
        norms = Norms(lambda: probe.layer_parameters)
        norms.copy_weights()
        model[0].weight = torch.nn.Parameter(100 * model[0].weight.detach())
        model[2] = torch.nn.Linear(5, 3)
        found = norms.numbers()
    whole = torch.cat([p.detach().flatten() for p in model[0].parameters()]).norm().item()
    assert found["weight_norm"] == {"0": pytest.approx(whole)}
    assert "update_to_weight" not in found
