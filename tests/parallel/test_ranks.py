"""Numbers and tensors of all ranks."""

import copy
from typing import Any

import torch
import torch.distributed as dist

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
