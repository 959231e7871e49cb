"""Layers that lie in parts over ranks."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from secorder import AttributionError, CurvatureProbe, InvalidArgumentError
from secorder.parallel.spread import Spread
from secorder.parallel.tensor_parallel import layouts, own, own_rows

from ..helpers import data, make, reference, run_ranks, step
from ..reference import assert_all_close


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["tensor_parallel", "tensor_parallel_options", "tensor_parallel_refusals"])
def test_ranks_agree_with_one_process(case: str, ranks: int) -> None:
    run_ranks(case, ranks)


@pytest.mark.slow
def test_with_samples_of_their_own_too() -> None:
    run_ranks("tensor_parallel_data", 4)


def test_one_rank_has_all(mesh: Any) -> None:
    model = parallelize_module(make(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, data())
        found = probe.fisher_diagonal().by_parameter()
    assert all(found[name].placements == p.placements for name, p in model.named_parameters())
    assert_all_close({n: x.full_tensor() for n, x in found.items()}, reference(make(), data()))


def test_how_inputs_and_gradients_lie(mesh: Any) -> None:
    spread = Spread((), (0,))

    def cut(placement: Any) -> Any:
        return distribute_tensor(torch.randn(4, 6), mesh, [placement])

    linear, table = nn.Linear(6, 4), nn.Embedding(4, 6)
    assert [layouts(linear, cut(x), spread) for x in (Shard(0), Shard(1), Replicate())] == [
        (None, -1),
        (-1, None),
        (None, None),
    ]
    assert [layouts(table, cut(x), spread) for x in (Shard(0), Shard(1), Replicate())] == [
        (None, None),
        (None, -1),
        (None, None),
    ]
    local = torch.randn(2, 5, 6)
    for placement, wanted in ((Shard(2), -1), (Replicate(), None)):
        assert torch.equal(own(DTensor.from_local(local, mesh, [placement]), wanted, "it"), local)
    assert own(local, None, "it") is local
    for placement, wanted in ((Shard(1), -1), (Shard(1), None), (Shard(2), None), (Replicate(), -1), (Partial(), None)):
        with pytest.raises(AttributionError, match="it lies over the ranks as"):
            own(DTensor.from_local(local, mesh, [placement]), wanted, "it")
    with pytest.raises(AttributionError, match="lies over the ranks as None"):
        own(local, -1, "it")


def test_rows_of_others_are_nothing() -> None:
    ids, g = torch.tensor([[0, 3], [2, 5]]), torch.ones(2, 2, 3)
    rows, kept = own_rows(ids, g, 2, 2)
    assert rows.tolist() == [[0, 1], [0, 1]]
    assert kept[..., 0].tolist() == [[0, 1], [1, 0]]


def test_other_ways_are_refused(mesh: Any) -> None:
    def by_channels(name: str, module: nn.Module, mesh: Any) -> None:
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])))

    model = distribute_module(nn.Sequential(nn.Conv2d(1, 2, 1)), mesh, by_channels)
    with pytest.raises(InvalidArgumentError, match=r"\(Conv2d\) lies over the ranks in a way"):
        CurvatureProbe(model)
    model = make()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Shard(0)]))
    with pytest.raises(InvalidArgumentError, match="some of which lie over the ranks"):
        CurvatureProbe(model)
    model = parallelize_module(make(), mesh, {"0": ColwiseParallel()})
    model[0].weight.requires_grad_(False)
    with pytest.raises(InvalidArgumentError, match="frozen"):
        CurvatureProbe(model, layers="0")
