"""Eigenvalues of the mean over batches, and not the mean of theirs."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch.utils.data import DataLoader

from secorder import CurvatureProbe, InvalidArgumentError

from ..helpers import data, make


@pytest.mark.parametrize("of", ["hessian", "ggn"])
def test_uneven_batches_and_a_generator_give_those_of_all_samples(of: Any) -> None:
    model, (x, y) = make(), data(9)
    batches = list(zip(x.split([2, 7]), y.split([2, 7]), strict=True))
    with CurvatureProbe(model, reduction="mean") as probe:
        whole = probe.hessian_eigenvalues(F.cross_entropy, x, y, of=of, tolerance=1e-10)
        for given in (DataLoader(batches, batch_size=None), iter(batches)):
            found = probe.hessian_eigenvalues(F.cross_entropy, given, of=of, tolerance=1e-10)
            for name, expected in whole.items():
                assert found[name].top == pytest.approx(expected.top, rel=1e-7)


def test_no_batch_is_refused() -> None:
    with CurvatureProbe(make()) as probe, pytest.raises(InvalidArgumentError, match="no batch"):
        probe.hessian_eigenvalues(F.cross_entropy, iter([]))
