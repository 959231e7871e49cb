"""What is said of results."""

import pytest
import torch

from secorder import CurvatureWarning, LayerInfo, Strategy, Trace
from secorder.oneshot.warn import warn_if_estimated, warn_if_not_finite

from ..helpers import no_warnings


def test_estimated_layers_are_named_and_exact_ones_are_not() -> None:
    exact, drawn = (LayerInfo(Strategy.CHAIN, num_draws=n, relative_error=n / 64) for n in (0, 8))
    with pytest.warns(CurvatureWarning, match=r"2 of 3 layers were estimated \('a', 'c'\), with .* up to 0.25, since"):
        warn_if_estimated({"a": drawn, "b": exact, "c": Trace(-4.0, 1.0, num_draws=3, converged=True)})
    with pytest.warns(CurvatureWarning, match="1 of 1 layers was estimated .'a'., with .* up to inf"):
        warn_if_estimated({"a": Trace(0.0, 1.0, num_draws=1, converged=False)})
    with no_warnings():
        warn_if_estimated({"a": exact, "b": Trace(0.0, 0.0, num_draws=0, converged=True)})


def test_values_that_are_not_finite_are_named_and_a_sum_that_overflows_is_none() -> None:
    with pytest.warns(CurvatureWarning, match="the Hessian of 'b' holds nan or infinite"):
        warn_if_not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}, "Hessian")
    with no_warnings():
        warn_if_not_finite({"a": torch.full((4,), 3e38, dtype=torch.float32)}, "Hessian")
