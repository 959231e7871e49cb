"""Sums and means of diagonals, and the standard error over batches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secorder
from secorder import CurvatureProbe, InvalidArgumentError, InvalidTypeError
from secorder.means import RunningMean

from .helpers import make
from .reference import assert_all_close, fisher_by_sample


def test_the_mean_of_parts_is_that_of_the_whole() -> None:
    model, x, y = make(nn.Tanh()), torch.randn(10, 4), torch.randint(3, (10,))
    with CurvatureProbe(model) as probe:
        parts = [probe.fisher_diagonal(F.cross_entropy, x[part], y[part]) for part in (slice(3), slice(3, 10))]
    found = secorder.weighted_mean(parts, [3, 7])
    assert_all_close(found.by_parameter(), fisher_by_sample(model, F.cross_entropy, x, y, 10))
    assert torch.equal(secorder.weighted_mean(parts)["0"], (parts[0]["0"] / 2 + parts[1]["0"] / 2))
    for diagonals, weights in ((parts, [1.0]), ([], None), (parts, [0, 0]), (parts, [2, -1])):
        with pytest.raises(InvalidArgumentError, match="weights"):
            secorder.weighted_mean(diagonals, weights)
    with CurvatureProbe(model, layers="0") as probe, pytest.raises(InvalidArgumentError, match="other layers"):
        secorder.weighted_mean([parts[0], probe.fisher_diagonal(F.cross_entropy, x, y)])


def test_the_standard_error_is_that_of_samples_grouped() -> None:
    """Batches of unequal size: over many data sets, the error has the variance that is told."""
    sizes, values, told = [2, 5, 5, 8], [], []
    for _ in range(4000):
        running = RunningMean.like([torch.zeros(1)])
        for size in sizes:
            running.add([torch.randn(size).mean()[None] + 1e3], size)
        values.append(running.mean[0])
        told.append(running.standard_error[0] ** 2)
    found, expected = torch.cat(told).mean().item(), torch.cat(values).var().item()
    assert expected == pytest.approx(1 / sum(sizes), rel=0.1)
    assert found == pytest.approx(expected, rel=0.1)
    assert RunningMean.like([torch.zeros(2)]).standard_error[0].isinf().all()


def test_the_mean_of_an_estimate_and_an_exact_one_keeps_its_standard_error() -> None:
    exact = measured(torch.ones(2))
    drawn = exact.replaced(exact, {"": torch.full((5,), 0.2)})
    for parts in ([exact, drawn, exact], [drawn, exact, exact]):
        errors = secorder.weighted_mean(parts, [1, 2, 1] if parts[1] is drawn else [2, 1, 1]).standard_error
        assert errors is not None
        torch.testing.assert_close(errors[""], torch.full((5,), 0.1))


def measured(targets: torch.Tensor) -> secorder.Diagonals:
    with CurvatureProbe(nn.Linear(4, 1)) as probe:
        return probe.hessian_diagonal(F.mse_loss, torch.ones(2, 4), targets[:, None], method="exact")


@pytest.mark.parametrize(
    ("diagonals", "weights"),
    [(None, None), (torch.tensor(1.0), None), ([{}], None), ("one", None), ("list", ["a"]), ("list", 2.0)],
)
def test_what_has_no_mean(diagonals: Any, weights: Any) -> None:
    found = measured(torch.ones(2))
    given = {"one": found, "list": [found]}
    with pytest.raises(InvalidTypeError, match="weighted_mean takes"):
        secorder.weighted_mean(given[diagonals] if isinstance(diagonals, str) else diagonals, weights)
    with pytest.raises(InvalidArgumentError, match="positive sum"):
        secorder.weighted_mean([found], [float("inf")])
