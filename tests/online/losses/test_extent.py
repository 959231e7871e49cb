"""Of how many samples numbers between a loss and its outputs are, and what that says of means over them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.graph import operation_of, tells_recomputation
from secorder._torch.loss_graph import place_of
from secorder.layers.layout import DIM_ZERO
from secorder.online.losses.extent import copies, mixes, of_several, over_samples, samples_of
from secorder.online.losses.marks import Output
from secorder.online.losses.seen import SeenLoss, see

from ...helpers import data, make
from ..loops import follow

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

#: A loss of outputs, shape (N, C).
Criterion = Callable[[Tensor], Tensor]


def seen(criterion: Criterion, samples: int = 6) -> SeenLoss:
    z = torch.randn(samples, 3, requires_grad=True) * 1.0
    found = see(
        {place_of(criterion(z)): torch.ones(())}, {0: {place_of(z): Output(DIM_ZERO, 1.0, samples)}}, joined=False
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("criterion", "of"),
    [
        (lambda z: z.square().sum(), 6),
        (lambda z: z.square().sum(1).exp()[0], 1),
        (lambda z: z.relu().mul(0).exp().sum(0)[0], 0),
    ],
)
def test_of_how_many_samples_a_number_is(criterion: Criterion, of: int) -> None:
    loss = seen(criterion)
    assert samples_of(loss, loss.order[0], 0) == of
    assert of_several(loss, (loss.order[0], 0)) is (of > 1)


def test_what_takes_several_numbers() -> None:
    loss = seen(lambda z: z.exp().sum())
    assert mixes((loss.order[0], 0), 0)
    assert not mixes((loss.order[1], 0), 0)


@pytest.mark.parametrize(
    ("criterion", "found"),
    [
        (lambda z: (z.mean() + z.sum(1)).sum(), (6, True)),
        (lambda z: (z.mean() * torch.full((6,), 2.0)).sum(), (6, True)),
        (lambda z: (z.mean() * torch.arange(6.0)).sum(), (6, False)),
        (lambda z: (z.mean(0) * torch.arange(6.0)[:, None]).sum(), (6, False)),
        (lambda z: (z.mean() * torch.arange(5.0)).sum(), (1, True)),
        (lambda z: (z.mean(1, keepdim=True) * torch.arange(6.0)).sum(), (1, True)),
    ],
    ids=["beside losses", "one factor", "weights", "of columns", "of no samples", "of each sample"],
)
def test_how_often_a_number_of_several_samples_is_taken(criterion: Criterion, found: tuple[int, bool]) -> None:
    loss = seen(criterion)
    assert copies(loss, 6, loss.order[1], 0) == found


@pytest.mark.parametrize(
    ("criterion", "over"),
    [
        (lambda z: z.square().sum(1).mean(), True),
        (lambda z: z.square().sum(0).mean(), False),
        (lambda z: torch.stack([z.sum(), z.exp().sum()]).mean(), False),
        (lambda z: (z.mean() + z.exp().sum(1)).mean(), True),
        (lambda z: ((z - z.detach().max()).exp().sum(1).log() + z.max() - z.max()).mean(), True),
    ],
    ids=["of losses", "of columns", "of terms", "of losses beside a mean", "of what cancels"],
)
def test_means_of_numbers_of_several_samples_are_not_over_these(criterion: Criterion, over: bool) -> None:
    for samples in (3, 6):
        loss = seen(criterion, samples)
        assert over_samples(loss, next(node for node in loss.order if operation_of(node) == "Mean")) is over


#: By what they are: means of as many sums, or means, as there are samples in some batch.
OF_TERMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "sums": (lambda z, t: torch.stack([F.cross_entropy(z * k, t, reduction="sum") for k in (1, 2, 3)]).mean(), "sum"),
    "means": (lambda z, t: torch.stack([F.cross_entropy(z * k, t) for k in (1, 2, 3)]).mean(), "mean"),
    "sums of columns": (lambda z, _: z.square().sum(0).mean(), "sum"),
    "means of columns": (lambda z, _: z.square().mean(0).mean(), "mean"),
}


@pytest.mark.parametrize("sizes", [(6, 7), (3, 4)])
@pytest.mark.parametrize("name", OF_TERMS)
def test_a_mean_of_terms_is_none_over_samples(name: str, sizes: tuple[int, int]) -> None:
    criterion, kind = OF_TERMS[name]
    for told in ("mean", "sum"):
        came = follow(make(), [data(n) for n in sizes], lambda m, b: criterion(m(b[0]), b[1]), reduction=told)
        assert came.exact if told == kind else came.refused


@pytest.mark.parametrize("told", ["mean", "sum"])
def test_sums_of_columns_by_their_numbers_are_neither(told: str) -> None:
    """As of tokens that are counted at each position."""

    def loss(z: Tensor) -> Tensor:
        return (z.square().sum(0) / torch.tensor([3.0, 2.0, 2.0]).to(z)).sum()

    assert follow(make(), [data(n) for n in (6, 3)], lambda m, b: loss(m(b[0])), reduction=told).refused
