"""Audits that wait to be compared."""

import copy

import pytest
import torch

from secorder.online.audit import failures
from secorder.online.audit.failures import MOST_PASSES, Failures
from secorder.online.audit.freivalds import Comparison


def found(layer: int, difference: float, kind: torch.dtype = torch.float32) -> Comparison:
    """Of a size of 100, of which a thousandth may be rounding."""
    whole = torch.tensor(3.0, dtype=kind)
    return Comparison(layer, whole, whole + difference, torch.tensor(1e4, dtype=kind), 1e-3)


@pytest.mark.parametrize("most", [1, 2, 5, 128])
def test_each_is_compared_before_it_is_told(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait, of steps in which as many are looked at, and of others; in the widest dtype."""
    monkeypatch.setattr(failures, "MOST", most)
    audits = Failures(torch.zeros(3, dtype=torch.long))
    for step in range(5):
        audits.compare([found(0, 0.05), found(2, 0.5)])
        if step == 2:
            audits.compare([found(1, -0.2)])
            audits.compare([])
            audits.compare([found(1, 0.1 - 1e-6, torch.float64), found(2, torch.nan)])
    assert copy.deepcopy(audits).counts.tolist() == [0, 1, 5]
    assert audits.counts.tolist() == [0, 1, 5]
    audits.compare([found(0, torch.inf)])
    assert audits.to(torch.device("cpu")).counts.tolist() == [1, 1, 5]


def test_the_host_knows_of_a_failure_before_anybody_asks() -> None:
    audits = Failures(torch.zeros(3, dtype=torch.long))
    for step in range(MOST_PASSES + 1):
        audits.compare([found(0, 0.05), found(1, 0.5)] if step == 3 else [found(1, 0.05)])
    assert audits.known
    audits.compare([found(0, 0.5)])
    assert audits.read() == [1, 1, 0]
