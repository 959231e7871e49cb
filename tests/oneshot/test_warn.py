"""What is said of results."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from secorder import CurvatureWarning
from secorder.layers.selection import select_layers
from secorder.oneshot import warn
from secorder.oneshot.warn import warn_if_estimated, warn_if_inexact, warn_if_not_finite


def test_estimated_layers_are_named_and_exact_ones_are_not() -> None:
    with pytest.warns(CurvatureWarning, match=r"2 of 3 layers were estimated \('a', 'c'\)"):
        warn_if_estimated({"a": 16, "b": 0, "c": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_estimated({"a": 0})


def test_values_that_are_not_finite_are_named_and_a_sum_that_overflows_is_none() -> None:
    with pytest.warns(CurvatureWarning, match="the Hessian of 'b' holds nan or infinite"):
        warn_if_not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}, "Hessian")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_not_finite({"a": torch.full((4,), 3e38, dtype=torch.float32)}, "Hessian")


@pytest.mark.parametrize("exact", [True, False])
def test_layers_whose_second_derivative_is_not_exact_are_named(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "second_derivative_is_exact", lambda: exact)
    layers = select_layers(nn.Sequential(nn.Linear(3, 3), weight_norm(nn.Linear(3, 2))))
    if not exact:
        with pytest.warns(CurvatureWarning, match="neither is the Hessian of '1'"):
            warn_if_inexact(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_inexact(layers if exact else layers[:1])
