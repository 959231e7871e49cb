"""One mean over what several forwards returned together is not a mean over the samples of each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder._torch.graph import tells_recomputation

from ...helpers import make
from ..loops import follow

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")


def batches(*sizes: int) -> list[Any]:
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]


def in_chunks(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(torch.cat([model(x) for x in batch[0].chunk(2)]), batch[1])


def of_steps(model: nn.Module, batch: Any) -> Tensor:
    """The steps of an episode, one observation each."""
    return -torch.stack([model(x[None]).log_softmax(1)[0, y] for x, y in zip(*batch, strict=True)]).mean()


@pytest.mark.parametrize(
    ("loss", "sizes", "options"),
    [
        (in_chunks, (5, 7), {}),
        (in_chunks, (8, 6), {"forwards": "separate"}),
        (of_steps, (4, 3), {"forwards": "separate", "sample_dim": 0}),
    ],
    ids=["of other sizes", "separate", "steps"],
)
def test_where_nothing_is_told_of_it_it_is_refused(
    loss: Callable[[nn.Module, Any], Tensor], sizes: tuple[int, ...], options: Any
) -> None:
    came = follow(make(), batches(*sizes), loss, **options)
    assert all("one mean over what several forwards returned" in reason for reason in came.refused.values())
    assert came.refused


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (in_chunks, {"loss_scale": 1 / 2}),
        (in_chunks, {"reduction": "sum", "loss_scale": 1 / 8}),
        (of_steps, {"loss_scale": 1 / 8, "sample_dim": 0}),
    ],
    ids=["a scale", "a sum", "steps"],
)
def test_what_is_told_is_taken(loss: Callable[[nn.Module, Any], Tensor], options: Any) -> None:
    assert follow(make(), batches(8, 8, 8), loss, forwards="separate", **options).exact


def own_means(model: nn.Module, batch: Any) -> Tensor:
    """Of as many samples each, those of the whole batch: means are put together, or outputs and summed."""
    (a, b), (s, t) = batch[0].chunk(2), batch[1].chunk(2)
    return torch.stack([F.cross_entropy(model(a), s), F.cross_entropy(model(b), t)]).sum()


def of_summed_steps(model: nn.Module, batch: Any) -> Tensor:
    return -torch.cat([model(x[None]).log_softmax(1)[:, y] for x, y in zip(*batch, strict=True)]).sum()


def features_averaged(model: nn.Module, batch: Any) -> Tensor:
    """Rows of two forwards that are one sample."""
    a, b = model(batch[0]), model(batch[0] + 1)
    return torch.stack([a, b]).square().mean()


def test_other_means_are_left_alone() -> None:
    def halves(batch: Any) -> list[Any]:
        x, y = batch
        return [(x[n : n + 1], y[n : n + 1]) for n in range(len(x))]

    def first(model: nn.Module, batch: Any) -> Tensor:
        return own_means(model, batch) if len(batch[0]) > 1 else F.cross_entropy(model(batch[0]), batch[1])

    assert follow(make(), batches(8, 6), first, halves, forwards="separate").exact
    assert follow(make(), batches(5, 4), of_summed_steps, forwards="separate", sample_dim=0).exact
    assert follow(make(), batches(5, 4), features_averaged, forwards="joined").exact
