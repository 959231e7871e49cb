"""The least of the numbers that are to be no less than they were is told when somebody asks."""

import pytest
import torch
from torch import Tensor

from secorder.online.doubts import Doubts


def test_one_number_among_many_is_told_and_nothing_is_kept() -> None:
    doubts, number = Doubts(), torch.tensor(6.0)
    for _ in range(9):
        doubts.expect(number, 6, "six")
        doubts.expect(torch.tensor(True), 1, "true")
    number.zero_()
    assert not doubts.read()
    doubts.expect(torch.tensor(5.0), 6, "six")
    doubts.expect(torch.tensor(7.0), 6, "six")
    assert list(doubts.read()) == ["six"] == list(doubts.read())
    doubts.expect(torch.tensor(False), 1, "true")
    assert list(doubts.read()) == ["six", "true"]


@pytest.mark.parametrize(
    ("number", "value", "told"),
    [
        (torch.tensor(2049, dtype=torch.float16), 2049, False),  # which half precision does not hold
        (torch.tensor(1024, dtype=torch.float16), 2048, True),
        (torch.tensor(torch.inf, dtype=torch.float16), 70000, False),
        (torch.tensor(float("nan")), 6, False),
        (torch.tensor(5), 6, True),
    ],
)
def test_rounding_and_nan_tell_nothing(number: Tensor, value: float, told: bool) -> None:
    doubts = Doubts()
    for other in (number, number, number.new_tensor(value)):
        doubts.expect(other, value, "less")
    assert bool(doubts.read()) == told
