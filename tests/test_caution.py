"""Warnings of the library."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from secorder import CurvatureProbe, CurvatureWarning
from secorder._caution import caution

from .helpers import data, make, step


def test_it_is_told_to_the_line_that_led_to_it() -> None:
    model = make()
    with CurvatureProbe(model) as probe:
        step(model, data())
        with pytest.warns(CurvatureWarning, match="assumed to be a mean") as told:
            str(probe)
    assert [warning.filename for warning in told] == [__file__]


def test_filters_that_make_errors_of_warnings_stop_no_training() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caution("nothing is raised")
        model, (inputs, targets) = make(torch.nn.BatchNorm1d(5)), data()
        with CurvatureProbe(model):
            F.cross_entropy(model(inputs), targets).backward()


@pytest.mark.parametrize("package", ["transformers.trainer", "lightning.pytorch.trainer.call", "torch.nn.modules"])
def test_a_line_of_a_trainer_is_not_the_users(package: str) -> None:
    namespace = {"__name__": package, "caution": caution}
    exec(compile("def call():\n    caution('a message')", "trainer.py", "exec"), namespace)
    with pytest.warns(CurvatureWarning, match="a message") as told:
        namespace["call"]()  # type: ignore[operator]
    assert [warning.filename for warning in told] == [__file__]
