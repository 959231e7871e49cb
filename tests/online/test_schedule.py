"""When something dear is done."""

import pytest

from secorder.online.schedule import Kinds, now_and_then


@pytest.mark.parametrize("one_in", [32, 100])
@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 13, 32, 55, 100])
def test_one_in_so_many_of_every_period(one_in: int, period: int) -> None:
    for offset in (0, period // 2):
        turns = [now_and_then(offset + period * index, one_in) for index in range(400 * one_in)]
        assert 360 <= sum(turns) <= 440


def test_what_is_of_another_kind_is_new_until_one_was_looked_at() -> None:
    kinds = Kinds()
    assert kinds.is_new("a")
    assert kinds.is_new("a")
    kinds.saw("a", 3)
    assert (kinds.is_new("a"), kinds.found("a"), kinds.found("b")) == (False, 3, None)
    assert kinds.is_new("b")


def test_where_each_is_of_a_kind_of_its_own_ever_fewer_are_new() -> None:
    kinds, turns = Kinds(), []
    for number in range(1, 200):
        if kinds.is_new(number):
            turns.append(number)
            kinds.saw(number)
    assert turns == [*range(1, 9), 16, 32, 64, 128]
