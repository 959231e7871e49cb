"""The trace of the accumulated Fisher and its standard error over samples."""

import math

import pytest
import torch
import torch.nn.functional as F

from secorder import CurvatureProbe, InvalidArgumentError, ProbeStateError
from secorder.online.norm_sums import Row
from secorder.online.trace import effective_samples, trace_of

from ..helpers import data, mlp, step
from ..reference import assert_close
from .test_norms import squares_by_sample


def test_the_error_is_that_of_a_mean_over_samples() -> None:
    squares = torch.rand(7)
    row = Row(7, 1, 1, 7, float(squares.sum()), float(squares.square().sum()), 7, 0, 0, 0)
    trace = trace_of(row, None, 7, 7)
    assert math.isclose(trace.value, float(squares.mean()))
    assert math.isclose(trace.standard_error, float(squares.std()) / math.sqrt(7))
    assert trace_of(row._replace(weight=0.0), 3.0, 7, 7).value == 3.0


def test_a_moving_average_has_fewer_samples_behind_it() -> None:
    decay, size, batches = 0.8, 5, 9
    weights = [(1 - decay) * decay**k / size for k in range(batches) for _ in range(size)]
    expected = sum(weights) ** 2 / sum(w**2 for w in weights)
    assert math.isclose(effective_samples(size * batches, batches, 1 - decay**batches, decay), expected)


@pytest.mark.parametrize("decay", [None, 0.8])
def test_over_steps_and_in_windows(decay: float | None) -> None:
    model, batches = mlp(), [data(n) for n in (6, 6, 6, 6)]
    rows = [squares_by_sample(model, batch) for batch in batches]
    with (
        CurvatureProbe(model, layers="0", reduction="mean", accumulate="trace", decay=decay) as alone,
        CurvatureProbe(model, layers="0", reduction="mean", decay=decay) as diagonal,
        CurvatureProbe(model, layers=["0", "2", "4"], reduction="mean", accumulate="trace", decay=decay) as probe,
    ):
        windows = []
        for batch in batches[:2]:
            step(model, batch)
        windows.append((probe.window(), rows[:2]))
        state = probe.state_dict()
        for batch in batches[2:]:
            step(model, batch)
        total, samples = probe.fisher_trace(), probe.num_samples
        windows += [(probe.window(), rows[2:])]
        for window, seen in windows:
            ages = [1.0 if decay is None else decay**age for age in reversed(range(len(seen)))]
            expected = sum(w * r.mean() for w, r in zip(ages, seen, strict=True)) / sum(ages)
            assert_close(torch.tensor(sum(x.value for x in window.fisher_trace().values())), expected)
        ages = [1.0 if decay is None else decay**age for age in (3, 2, 1, 0)]
        expected = sum(w * r.mean() for w, r in zip(ages, rows, strict=True)) / sum(ages)
        assert_close(torch.tensor(sum(x.value for x in total.values())), expected)
        assert samples == total["0"].num_samples == 24
        one, both = alone.fisher_trace()["0"], diagonal.fisher_trace()["0"]
        assert math.isclose(one.value, both.value, rel_tol=1e-9)
        assert one.num_samples == both.num_samples
        probe.load_state_dict(state)
        for batch in batches[2:]:
            step(model, batch)
        assert probe.fisher_trace() == total


def test_a_diagonal_of_norms_alone_is_not_told() -> None:
    model = mlp()
    with CurvatureProbe(model, accumulate="trace", reduction="mean") as probe:
        with pytest.raises(ProbeStateError, match="was not called"):
            probe.fisher_trace()
        step(model, data())
        with pytest.raises(ProbeStateError, match='accumulate="diagonal"'):
            probe.fisher_diagonal()
        state = probe.state_dict()
    with CurvatureProbe(model) as other, pytest.raises(InvalidArgumentError, match="accumulate='trace'"):
        other.load_state_dict(state)
    with pytest.raises(InvalidArgumentError, match="accumulate must be"):
        CurvatureProbe(model, accumulate="everything")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="penalty"):
        CurvatureProbe(model, accumulate="trace", penalty="shared")


def test_without_norms_the_error_is_not_a_number() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, penalty="shared", reduction="mean") as probe:
        (F.cross_entropy(model(batch[0]), batch[1]) + model[0].weight.square().sum()).backward()
        trace = probe.fisher_trace()["0"]
        assert math.isclose(trace.value, float(probe.fisher_diagonal()["0"].sum()))
        assert math.isnan(trace.standard_error)
