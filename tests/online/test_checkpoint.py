"""What was accumulated goes into a state and comes back."""

from typing import Any

import pytest
import torch

from secorder import CurvatureProbe, InvalidArgumentError

from ..helpers import data, mlp, step


def test_a_state_is_tensors_alone_and_comes_back() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, decay=0.9, reduction="mean") as probe:
        step(model, batch)
        state = probe.state_dict()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        before = probe.fisher_diagonal()
        step(model, batch)
        probe.load_state_dict(state)
        assert probe.num_samples == 6
        assert all(torch.equal(probe.fisher_diagonal()[name], value) for name, value in before.items())


def test_the_default_device_is_no_concern_of_a_state() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, decay=0.9) as probe:
        step(model, batch)
        with torch.device("meta"):
            state = probe.state_dict()
            probe.load_state_dict(state)
        assert not any(value.is_meta for value in state.values())


def test_a_state_that_is_none() -> None:
    probe = CurvatureProbe(mlp())
    for state in ({}, None, "probe.pt", dict.fromkeys(probe.state_dict(), 1)):
        with pytest.raises(InvalidArgumentError, match="version"):
            probe.load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
@pytest.mark.parametrize("windows", [False, True])
def test_a_damaged_state_is_refused_whole(accumulate: Any, windows: bool) -> None:
    """Each part in turn is cut, or missing."""
    model, batch = mlp(), data()
    with CurvatureProbe(model, accumulate=accumulate, reduction="mean") as probe:
        step(model, batch)
        if windows:
            probe.window()
            step(model, batch)
        state, before = probe.state_dict(), probe.fisher_trace()
        optional = "earlier/seen"  # without which there was no window
        for key, value in state.items():
            cut = {**state, key: value.flatten()[:-1]}
            missing = {other: x for other, x in state.items() if other != key}
            for damaged in (cut, missing) if key != optional else (cut,):
                with pytest.raises(InvalidArgumentError, match="state"):
                    probe.load_state_dict(damaged)
        assert probe.fisher_trace() == before
        probe.load_state_dict(state)
        assert probe.fisher_trace() == before
