"""What a forward that begins is recorded as, or why it is not."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning
from secorder.online.opening import open_record

from ..helpers import Net, data, mlp, step


def test_a_record_of_a_batch() -> None:
    model, (inputs, _) = mlp(), data()
    with CurvatureProbe(model) as probe:
        assert probe._attachment is not None
        record = open_record(probe._attachment, (inputs,), {})
        assert record is not None
        assert record.num_samples == 6
        assert record.verified
        assert record.shapes == ((6, 4),)
        assert open_record(probe._attachment, (inputs[:0],), {}) is None
        assert probe._fisher.troubles._causes == {"empty"}


def test_a_layer_that_has_left_the_model_raises_at_once_where_the_probe_is_strict() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, strict=True) as probe:
        step(model, batch)
        model[4] = nn.Linear(5, 3)
        with pytest.raises(AttributionError, match="taken its place"):
            step(model, batch)
        assert torch.is_grad_enabled()
        assert probe.attached


def test_batches_that_cannot_be_told_are_warned_of_once() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model):
        step(model, batch)
        model[4] = nn.Linear(5, 3)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                step(model, batch)
    assert [one.category for one in told] == [CurvatureWarning]


def test_a_model_of_which_nothing_can_be_told_is_not_looked_at_at_each_step() -> None:
    runs = itertools.count()

    def forward(m: Any, text: str) -> Tensor:
        next(runs)
        return m.a(torch.full((1, 4), float(len(text))))

    model = Net(forward, a=nn.Linear(4, 3))
    with CurvatureProbe(model) as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for steps in (8, 8):
            for _ in range(steps):
                model("ab").sum().backward()
            with pytest.raises(AttributionError, match="called with str and no tensor"):
                probe.fisher_diagonal()
            probe.reset()
    assert next(runs) <= 16 + 2 * 5  # batches 1, 2, 4, 8 and 16
