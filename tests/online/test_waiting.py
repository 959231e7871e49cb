"""Layers that wait to be added together."""

import math
from typing import Literal

import pytest
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning
from secorder.online import waiting
from secorder.online.audit.audited import Audited

from ..helpers import data, reference, step
from ..reference import assert_all_close


def chain() -> nn.Sequential:
    """Three layers, one without a bias."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Hardtanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("most", ["none", "MOST_ELEMENTS", "MOST_LAYERS"])
def test_how_many_wait_changes_nothing(most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch, whose gradients are alone in ``.grad``, and the next one; few samples, and more than few."""
    if most != "none":
        monkeypatch.setattr(waiting, most, 0)
    model, batches = chain(), [data(5), data(40)]
    with (
        CurvatureProbe(model, reduction="mean") as probe,
        CurvatureProbe(model, accumulate="trace", reduction="mean") as traced,
    ):
        for batch in batches:
            step(model, batch)
        few, many = (reference(model, batch) for batch in batches)
        expected = {name: (5 * few[name] + 40 * many[name]) / 45 for name in few}
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        for name, found in traced.fisher_trace().items():
            trace = sum(float(own.sum()) for key, own in expected.items() if key.startswith(f"{name}."))
            assert math.isclose(found.value, trace, rel_tol=1e-5)


def overwrite(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    output.register_hook(lambda g: output.detach().zero_() * 0 + g)


def test_an_input_that_is_overwritten_while_its_layer_waits() -> None:
    """The batch is left out of that layer; the others have theirs."""
    model, batch = chain(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batch)
        expected = reference(model, batch)
        model[3].register_forward_hook(overwrite)  # the input of the last layer, whose gradient has come
        with pytest.warns(CurvatureWarning, match="'4'.*overwritten in place"):
            step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


@pytest.mark.parametrize("audited", [False, True])
def test_a_layer_whose_norms_are_all_that_is_asked_does_not_wait(
    audited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its factors may be overwritten as soon as its gradient has come; where it is audited, the batch is left out."""
    model, batch = chain(), data()
    with CurvatureProbe(model, accumulate="trace", reduction="mean") as probe:
        step(model, batch)
        expected = reference(model, batch)
        if not audited:
            monkeypatch.setattr(Audited, "draw", lambda *_, **__: set())
        model[3].register_forward_hook(overwrite)  # the input of the last layer, whose gradient has come
        if audited:
            with pytest.warns(CurvatureWarning, match="'4'.*overwritten in place"):
                step(model, batch)
        else:
            step(model, batch)
        found = probe.fisher_trace()
    assert [x.num_samples for x in found.values()] == [12, 12, 6 if audited else 12]
    for name, own in found.items():
        trace = sum(float(part.sum()) for key, part in expected.items() if key.startswith(f"{name}."))
        assert math.isclose(own.value, trace, rel_tol=1e-9)


def test_what_waits_when_a_backward_is_broken_off_is_forgotten_by_a_reset() -> None:
    model, batch = chain(), data()

    def fails(_: Tensor) -> None:
        raise ValueError("half-way")

    with CurvatureProbe(model, reduction="mean") as probe:
        handle = model[0].weight.register_hook(fails)
        with pytest.raises(ValueError, match="half-way"):
            step(model, data(3))
        handle.remove()
        probe.reset()
        step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_a_batch_whose_squares_are_no_numbers_is_left_out(accumulate: Literal["diagonal", "trace"]) -> None:
    """It is not taken for one whose gradients come from outside of the layers either."""
    model, batch = chain(), data()
    with CurvatureProbe(model, accumulate=accumulate, reduction="mean") as probe:
        step(model, batch)
        (model(batch[0]).mean() * 1e200).backward()
        model.zero_grad()
        step(model, batch)
        expected = reference(model, batch)
        for name, found in probe.fisher_trace().items():
            trace = sum(float(own.sum()) for key, own in expected.items() if key.startswith(f"{name}."))
            assert math.isclose(found.value, trace, rel_tol=1e-5)
            assert found.num_samples == 2 * len(batch[0])


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_layers_of_which_a_part_is_frozen_are_explained(
    trained: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then weight and bias are not one number of the audit."""
    if not small:
        monkeypatch.setattr(waiting, "SMALL_ELEMENTS", 0)
    model, batch = chain(), data(40)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(3):
            step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
