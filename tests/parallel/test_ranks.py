"""Numbers and tensors of all ranks."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from secorder import AttributionError
from secorder.parallel.ranks import Ranks


def test_of_one_rank_all_is_its_own(mesh: Any) -> None:
    for ranks in (Ranks(((mesh, 0),), ()), Ranks((), ((mesh, 0),)), Ranks(((mesh, 0),), ((mesh, 0),))):
        assert ranks.together([1, 2.5]) == ranks.largest([1, 2.5]) == [1, 2.5]
        assert ranks.any(True)
        assert not ranks.any(False)
        given = torch.arange(3.0)
        for found in (ranks.most(given), ranks.of_all_samples(given), ranks.of_all_parts(given)):
            assert torch.equal(found, given)
        assert not ranks.holds(dist.group.WORLD)
        assert copy.deepcopy(ranks) is ranks


class Two(Ranks):
    """This rank and another one, which says the same but for what it is told to say."""

    def largest(self, numbers: list[float]) -> list[float]:
        return [max(pair) for pair in zip(numbers, self.other, strict=True)]  # type: ignore[attr-defined]


def other(*says: float) -> Two:
    ranks = Two((), ())
    object.__setattr__(ranks, "other", list(says))
    return ranks


def test_a_bad_part_is_bad_for_all_and_a_missing_one_is_told() -> None:
    number = 3632233996  # of "test" by CRC-32
    assert not other(0, 0, number, -number).agree("test", bad=False)
    assert other(1, 0, number, -number).agree("test", bad=False)
    with pytest.raises(AttributionError, match="another rank"):
        other(1, 1, number, -number).agree("test", bad=False)
    with pytest.raises(AttributionError, match="in different orders"):
        other(0, 0, 7, -7).agree("test", bad=False)
    other(0, 0, number, -number).give_up("test")
