"""How parameters lie over ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from secorder.parallel.spread import Spread, is_distributed


def parameter(shape: tuple[int, ...], placement: Any, rank: int, ranks: int) -> Any:
    mesh = SimpleNamespace(size=lambda dim: ranks, get_local_rank=lambda dim: rank)
    return SimpleNamespace(shape=torch.Size(shape), placements=(placement,), device_mesh=mesh)


@pytest.mark.parametrize(
    ("shape", "placement", "ranks"),
    [((8, 3), Shard(0), 2), ((7, 3), Shard(0), 3), ((2, 9), Shard(1), 4), ((2, 3), Shard(0), 4)],
)
def test_parts_are_those_of_chunk(shape: tuple[int, ...], placement: Shard, ranks: int) -> None:
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    chunks = list(whole.chunk(ranks, placement.dim))
    spread = Spread((), (0,))
    for rank in range(ranks):
        p = parameter(shape, placement, rank, ranks)
        empty = whole.narrow(placement.dim, 0, 0)
        expected = chunks[rank] if rank < len(chunks) else empty
        assert spread.shape(p) == expected.shape
        assert torch.equal(whole.narrow(placement.dim, *spread.part(p, 0)), expected)
        assert spread.answers_for(p)


def test_what_all_have_is_counted_once() -> None:
    spread = Spread((), (0,))
    assert [spread.answers_for(parameter((2,), Replicate(), rank, 2)) for rank in range(2)] == [True, False]
    assert Spread((0,), ()).answers_for(parameter((2,), Replicate(), 1, 2))


def test_a_gradient_that_came_whole_is_cut(mesh: Any) -> None:
    spread, whole = Spread((), (0,)), torch.randn(6, 4)
    second = parameter((6, 4), Shard(0), 1, 2)
    came = DTensor.from_local(whole, mesh, [Replicate()])
    assert is_distributed(came)
    assert not is_distributed(whole)
    assert torch.equal(spread.part_of_gradient(came, second), whole[3:])
    assert torch.equal(spread.part_of_gradient(DTensor.from_local(whole, mesh, [Shard(0)]), second), whole)
    assert spread.part_of_gradient(DTensor.from_local(whole, mesh, [Partial()]), second) is None
    assert spread.part_of_gradient(DTensor.from_local(whole, mesh, [Shard(1)]), second) is None
    assert torch.equal(spread.part_of_gradient(whole, second), whole)
