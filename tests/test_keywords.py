"""Keywords that had another name are answered by the new one."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F

import secorder
from secorder import CurvatureProbe, CurvatureRecorder, InvalidArgumentError
from secorder._keywords import refuses_renamed_keywords

from .helpers import Recording, data, make

CALLS: dict[str, Callable[..., Any]] = {
    "fisher_diagonal": lambda **k: CurvatureProbe(make()).fisher_diagonal(F.cross_entropy, *data(), **k),
    "hessian_diagonal": lambda **k: CurvatureProbe(make()).hessian_diagonal(F.cross_entropy, *data(), **k),
    "hessian_trace": lambda **k: CurvatureProbe(make()).hessian_trace(F.cross_entropy, *data(), **k),
    "estimate_cost": lambda **k: CurvatureProbe(make()).estimate_cost(F.cross_entropy, *data(), **k),
    "per_layer_fisher_diagonal": lambda **k: secorder.per_layer_fisher_diagonal(make(), F.cross_entropy, *data(), **k),
    "per_layer_hessian_diagonal": lambda **k: secorder.per_layer_hessian_diagonal(
        make(), F.cross_entropy, *data(), **k
    ),
    "diagnose": lambda **k: secorder.diagnose(make(), F.cross_entropy, *data(), **k),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("old", "new"), [("num_samples", "num_draws"), ("max_num_samples", "max_draws")])
def test_an_old_keyword_is_told_its_new_name(name: str, old: str, new: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{name}\(\) takes {new}= in place of {old}=\.$"):
        CALLS[name](**{old: 3})


def test_a_recorder_says_so_when_it_is_made() -> None:
    probe = CurvatureProbe(make())
    with pytest.raises(InvalidArgumentError, match="takes num_draws= in place of num_samples="):
        CurvatureRecorder(probe, Recording(), hessian_every=5, loss_fn=F.cross_entropy, batch=data(), num_samples=3)


def test_a_keyword_that_never_was_is_left_to_python() -> None:
    with pytest.raises(TypeError, match="samples"):
        CALLS["diagnose"](samples=3)


def test_nothing_else_of_the_function_changes() -> None:
    def function(x: int, *, num_draws: int = 1) -> int:
        """Told."""
        return x * num_draws

    checked = refuses_renamed_keywords(function)
    assert checked(2, num_draws=3) == 6
    assert checked.__doc__ == "Told."
    assert inspect.signature(checked) == inspect.signature(function)
