"""Layers whose own calls do not tell are measured by the module around them."""

import pytest

from secorder import CurvatureProbe, CurvatureWarning

from ..helpers import data, make, reference, step
from ..reference import assert_all_close


def test_frozen_layer_without_gradient_is_measured_by_the_module_around_it() -> None:
    model, batch = make(), data()
    model[0].requires_grad_(False)
    probe = CurvatureProbe(model, frozen=True)
    with pytest.warns(CurvatureWarning, match=r"\['0'\].*exact and slow"):
        step(model, batch)
    step(model, batch)  # warns once
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
