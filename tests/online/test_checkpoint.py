"""What was accumulated goes into a state and comes back."""

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
    with pytest.raises(InvalidArgumentError, match="version"):
        probe.load_state_dict({})
