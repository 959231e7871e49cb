"""Of several forwards, a mean is one over the samples of each: one over all of them is refused, and so are others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder._torch.graph import tells_recomputation
from secorder.online.losses.watching import watches

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


#: Of what several forwards returned and its labels, the loss of all.
Criterion = Callable[[list[tuple[Tensor, Tensor]]], Tensor]


def summed(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, reduction="sum")


def in_all(own: list[tuple[Tensor, Tensor]]) -> int:
    return sum(len(z) for z, _ in own)


ADDED: dict[str, Criterion] = {
    "mean": lambda own: torch.stack([F.cross_entropy(z, t) for z, t in own]).sum(),
    "sum": lambda own: torch.stack([summed(z, t) for z, t in own]).sum(),
}

#: Of which none is a sum of the forwards' means, or sums.
OTHERS: dict[str, Criterion] = {
    "averaged": lambda own: ADDED["mean"](own) / len(own),
    "a mean of means": lambda own: torch.stack([F.cross_entropy(z, t) for z, t in own]).mean(),
    "each divided": lambda own: torch.stack([F.cross_entropy(z, t) / len(own) for z, t in own]).sum(),
    "shares": lambda own: torch.stack([F.cross_entropy(z, t) * (len(z) / in_all(own)) for z, t in own]).sum(),
    "sums, divided": lambda own: ADDED["sum"](own) / in_all(own),
    "of all": lambda own: torch.cat([F.cross_entropy(z, t, reduction="none") for z, t in own]).mean(),
}


def of_parts(criterion: Criterion, number: int) -> Callable[[nn.Module, Any], Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        parts = zip(*(x.tensor_split(min(number, len(x))) for x in batch), strict=True)
        return criterion([(model(x), t) for x, t in parts])

    return loss


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("told", ["mean", "sum"])
@pytest.mark.parametrize(("sizes", "number"), [((6, 6), 2), ((8, 5), 2), ((9, 6), 3), ((4, 4), 4), ((5, 7), 9)])
def test_what_divides_once_more_is_refused(name: str, told: str, sizes: tuple[int, ...], number: int) -> None:
    options = {"forwards": "separate", "sample_dim": 0}
    assert follow(make(), batches(*sizes), of_parts(OTHERS[name], number), reduction=told, **options).refused


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("number", [2, 3])
def test_means_are_no_sums_of_any_of_several(kind: str, number: int) -> None:
    loss, other = of_parts(ADDED[kind], number), {"sum": "mean", "mean": "sum"}[kind]
    assert follow(make(), batches(6, 9), loss, reduction=kind, forwards="separate").exact
    came = follow(make(), batches(6, 9), loss, reduction=other, forwards="separate")
    assert came.refused
    assert all(f'pass reduction="{kind}"' in reason for reason in came.refused.values())


@pytest.mark.parametrize("told", ["mean", "sum"])
def test_a_mean_and_a_sum_are_refused(told: str) -> None:
    loss = of_parts(lambda own: sum((summed(*one) for one in own[1:]), F.cross_entropy(*own[0])), 2)
    assert follow(make(), batches(6, 8), loss, reduction=told, forwards="separate").refused


def test_a_factor_that_is_specified_is_part_of_the_loss() -> None:
    came = follow(make(), batches(6, 8), of_parts(OTHERS["averaged"], 2), forwards="separate", loss_scale=0.5)
    assert came.exact


def test_all_forwards_of_a_backward_are_looked_at() -> None:
    """Of each three, the third is never one of the batches that are verified: 1, 2, 4, 8, …"""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, t = batch
        spread = model(x - 1).var(0, correction=0).sum()
        return F.cross_entropy(model(x), t) + F.cross_entropy(model(x + 1), t) + 0.3 * spread

    came = follow(make(), batches(6, 7), loss, forwards="joined")
    assert all("couples the samples" in reason for reason in came.refused.values())
    assert came.refused


def test_a_forward_without_a_backward_has_no_more_looked_at() -> None:
    model, kept, looked = make(), [], []
    with CurvatureProbe(model, reduction="mean") as probe:
        for step, (x, t) in enumerate(batches(*[6] * 7)):
            if step == 3:
                kept.append(model(x))
            loss = F.cross_entropy(model(x), t)
            looked.append(watches(probe._attachment))
            loss.backward()
    assert looked == [True, True, False, True, False, False, True]  # forwards 1, 2, 5, which comes after 4, and 8


def test_of_long_episodes_few_forwards_are_looked_at() -> None:
    """One in a hundred is, so that one of nearly each is: with all behind it, each backward would be a slow one."""
    model, looked = make(), []
    with CurvatureProbe(model, reduction="sum", forwards="joined") as probe:
        for _ in range(6):
            steps = []
            for _ in range(128):
                steps.append(model(torch.randn(2, 4)))
                looked.append(watches(probe._attachment))
            torch.stack(steps).square().sum().backward()
    assert all(looked[:128])
    assert sum(looked[3 * 128 :]) < 128
