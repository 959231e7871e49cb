"""What is recorded follows parameters that are exchanged or moved."""

import torch
from torch import nn

from secorder import CurvatureProbe
from secorder.online.exchanged import refresh

from ..helpers import data, mlp, reference, step
from ..reference import assert_all_close


def test_parameters_that_took_the_place_of_others_are_those_that_are_told() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        assert refresh(probe._fisher, probe._looks)
        model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)
        step(model, batch)
        assert probe._fisher.layers[0].parameters["weight"] is next(model.parameters())
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_nothing_is_recorded_of_a_model_without_memory() -> None:
    model = nn.Sequential(nn.Linear(4, 3, device="meta"))
    with CurvatureProbe(model, reduction="mean") as probe:
        assert not refresh(probe._fisher, probe._looks)
        assert "meta device" in probe._fisher.troubles.marks["0"]
