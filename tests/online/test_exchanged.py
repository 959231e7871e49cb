"""What is recorded follows parameters that are exchanged or moved."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online.exchanged import refresh

from ..helpers import data, mlp, reference, step
from ..reference import assert_all_close


def test_parameters_that_took_the_place_of_others_are_those_that_are_told() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        assert refresh(probe._fisher, probe._attributions)
        model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)
        step(model, batch)
        assert probe._fisher.layers[0].parameters["weight"] is next(model.parameters())
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_nothing_is_recorded_of_a_model_without_memory() -> None:
    model = nn.Sequential(nn.Linear(4, 3, device="meta"))
    with CurvatureProbe(model, reduction="mean") as probe:
        assert not refresh(probe._fisher, probe._attributions)
        assert "meta device" in probe._fisher.troubles.marks["0"]


@pytest.mark.parametrize("by", ["functional_call", "buffers", "attributes"])
def test_a_forward_with_constants_in_place_of_all_parameters_is_passed_over(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a target network, which modules of other libraries are for a while."""
    model, batch = mlp(), data()
    constants = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    looks: list[int] = []

    def target(inputs: Tensor) -> Tensor:
        if by == "functional_call":
            return torch.func.functional_call(model, constants, inputs)
        kept = [(m, dict(m._parameters)) for m in model if m._parameters]
        for name, value in constants.items():
            layer, _, local = name.partition(".")
            delattr(model[int(layer)], local)
            if by == "buffers":
                model[int(layer)].register_buffer(local, value)
            else:
                setattr(model[int(layer)], local, value)
        try:
            return model(inputs)
        finally:
            for module, parameters in kept:
                for local in parameters:
                    delattr(module, local)
                module._parameters.update(parameters)

    with CurvatureProbe(model, reduction="mean") as probe:
        look = probe._attributions.verify
        monkeypatch.setattr(probe._attributions, "verify", lambda *a, **k: looks.append(1) or look(*a, **k))
        for _ in range(4):
            step(model, batch)
            target(batch[0])
        assert len(looks) == 1
        assert probe.num_samples == 4 * 6
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.norm(x))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ["blocks.1"]),
        ({"layer_types": "all"}, ["blocks.1"]),
        ({"layers": "blocks.*"}, ["blocks.1"]),
        ({"layers": "head"}, []),
        ({"layer_types": nn.LayerNorm}, []),
    ],
)
def test_layers_that_a_model_grows_are_told_not_to_be_measured(options: dict[str, Any], told: list[str]) -> None:
    model, batch = Grows(), data()
    with warnings.catch_warnings(record=True) as caught, CurvatureProbe(model, reduction="mean", **options) as probe:
        warnings.simplefilter("always")
        step(model, batch)
        assert not caught
        model.blocks.append(nn.Linear(4, 4))
        for _ in range(4):
            step(model, batch)
        names = ", ".join(map(repr, told))
        assert [f"layers {names} are trained now" in str(w.message) for w in caught] == [True] * len(told)
        found = probe.fisher_diagonal()
        assert set(found) == set(probe.layer_names)


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_are_trained_only_later_are_told_not_to_be_measured(frozen: bool) -> None:
    model, batch = mlp(), data()
    model[0].requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with CurvatureProbe(model, reduction="mean", frozen=frozen) as probe:
            step(model, batch)
            model.requires_grad_(False)  # nothing is trained: none is new
            step(model, (batch[0].clone().requires_grad_(), batch[1]))
            model.requires_grad_(True)
            for _ in range(4):
                step(model, batch)
            copy.deepcopy(probe), pickle.dumps(probe)
    said = [str(w.message) for w in caught if "are trained now" in str(w.message)]
    assert [message.startswith("layers '0' ") for message in said] == [True] * (not frozen)


def test_a_parameter_that_comes_back_is_told_again() -> None:
    """Whatever was seen of the model meanwhile: what is compared with is what the layers have now."""
    model, batch = mlp(), data()
    first = next(x for x in model.modules() if isinstance(x, nn.Linear))
    weights = [first.weight, nn.Parameter(2 * first.weight.detach())]
    with CurvatureProbe(model, reduction="mean") as probe:
        for turn in (0, 1, 0, 0, 1):
            first.weight = weights[turn]
            probe.reset()
            step(model, batch)
            assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_parameters_that_modules_within_hold_are_compared_as_others_are() -> None:
    """Nothing is made anew where they are as they were, and they are followed where they are not."""
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    model, batch = nn.Sequential(parametrized, nn.Tanh(), nn.Linear(5, 3)), (torch.randn(4, 6), torch.randn(4, 3))
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batch)
        made = [plan for plan in probe._fisher.plans.values() if plan is not None]
        assert made
        step(model, batch)
        assert all(any(plan is own for own in probe._fisher.plans.values()) for plan in made)
        held = parametrized.parametrizations.weight
        held.original1 = nn.Parameter(2 * held.original1.detach())
        probe.reset()
        step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
