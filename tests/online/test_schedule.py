"""When something dear is done."""

import pytest

from secorder.online.schedule import now_and_then


@pytest.mark.parametrize("one_in", [32, 100])
@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 13, 32, 55, 100])
def test_one_in_so_many_of_every_period(one_in: int, period: int) -> None:
    for offset in (0, period // 2):
        turns = [now_and_then(offset + period * index, one_in) for index in range(400 * one_in)]
        assert 360 <= sum(turns) <= 440
