"""A loss that chooses among the samples of a batch is refused; one that chooses within each is not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe
from secorder._torch.graph import tells_recomputation
from secorder._torch.loss_graph import place_of
from secorder.layers.layout import Layout
from secorder.online.losses.choices import chooses
from secorder.online.losses.marks import Output
from secorder.online.losses.seen import see

from ...helpers import Net, data, mlp
from ..loops import follow

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

#: A loss of outputs, shape (N, 3), and labels.
Criterion = Callable[[Tensor, Tensor], Tensor]


def hardest_triplets(z: Tensor, t: Tensor) -> Tensor:
    """Hermans et al. (2017)."""
    distances, same = torch.cdist(z, z), t[:, None] == t
    positive, negative = (distances * same).max(1).values, (distances + 1e3 * same).min(1).values
    return (positive - negative + 5).relu().mean()


def pairwise_hinge(z: Tensor, t: Tensor) -> Tensor:
    return ((1 - z[:, :1] + z[:, 0]) * (t[:, None] > t)).relu().mean()


CHOOSING: dict[str, Criterion] = {
    "the hardest samples": lambda z, t: F.cross_entropy(z, t, reduction="none").topk(4).values.mean(),
    "the hardest triplets": hardest_triplets,
    "the worst sample": lambda z, t: F.cross_entropy(z, t, reduction="none").max(),
    "the worst sample by amax": lambda z, t: F.cross_entropy(z, t, reduction="none").amax(0),
    "a median": lambda z, t: (z[:, 0] - t - (z[:, 0] - t).median()).abs().mean(),
    "sorted": lambda z, _: (z.sort(0).values - torch.linspace(-1, 1, len(z))[:, None]).abs().mean(),
    "a ranking": pairwise_hinge,
    "nearest neighbours": lambda z, _: (z[:, None] - z).abs().sum(-1).add(9 * torch.eye(len(z))).amin(1).mean(),
    "kernels of distances": lambda z, _: torch.exp(-torch.cdist(z, z)).mean(),
    "a hinge on means of features": lambda z, _: (z.mean(0) - 3).abs().mean(),
    "a hinge on a mean, beside": lambda z, t: F.cross_entropy(z, t) + (z.mean() + 9).relu(),
    "a hinge on a mean that is not met": lambda z, t: F.cross_entropy(z, t) + (z.mean() - 9).relu(),
    "free bits of the batch": lambda z, t: F.cross_entropy(z, t) + z.square().sum(1).mean().clamp(min=0.1),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_a_loss_that_chooses_among_samples_is_refused(name: str) -> None:
    model = mlp()
    with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, t = data(8)
        CHOOSING[name](model(x), t).backward()
        with pytest.raises(AttributionError, match="couples the samples"):
            probe.fisher_diagonal()


def shifted(z: Tensor, t: Tensor) -> Tensor:
    most = z.max()
    return ((z - most).exp().sum(1).log() + most - z.gather(1, t[:, None])[:, 0]).mean()


WITHIN: dict[str, Criterion] = {
    "the best class": lambda z, t: (z.max(1).values - t).square().mean(),
    "sorted classes": lambda z, t: (z.sort(1).values - t[:, None]).abs().mean(),
    "sorted losses": lambda z, t: F.cross_entropy(z, t, reduction="none").sort().values.mean(),
    "the hardest classes": lambda z, t: (z - t[:, None]).abs().topk(2, 1).values.mean(),
    "quantiles": lambda z, t: torch.max(0.9 * (z - t[:, None]), 0.1 * (t[:, None] - z)).mean(),
    "clipped": lambda z, _: -torch.min(z.exp(), z.exp().clamp(0.8, 1.2)).mean(),
    "shifted by the largest": shifted,
    "distances to codes": lambda z, _: torch.cdist(z, torch.eye(3).to(z)).min(1).values.mean(),
    "flooded": lambda z, t: (F.cross_entropy(z, t) - 0.9).abs(),
    "bounded": lambda z, t: F.cross_entropy(z, t).clamp(max=9.0) / 2,
    "free bits of samples": lambda z, t: F.cross_entropy(z, t) + z.square().sum(1).clamp(min=0.1).mean(),
}


@pytest.mark.parametrize("name", WITHIN)
def test_a_loss_that_chooses_within_each_sample_is_exact(name: str) -> None:
    batches = [data(n) for n in (8, 6)]
    batches = [(x.double(), t) for x, t in batches]
    assert follow(mlp().double(), batches, lambda m, b: WITHIN[name](m(b[0]), b[1])).exact


def test_samples_that_are_rows_of_several() -> None:
    """A maximum over each sample's positions is its own affair; one over all that follow one another is not."""
    z = torch.randn(6, 2, requires_grad=True) * 1.0
    layout = Layout(rows=2)
    for loss, coupled in ((z.unflatten(0, (3, 2)).amax(1).sum(), False), (z.unflatten(0, (2, 3)).amax(1).sum(), True)):
        seen = see({place_of(loss): torch.ones(())}, {0: {place_of(z): Output(layout, 1.0, 3)}}, joined=False)
        assert seen is not None
        assert bool(chooses(seen)) is coupled


def test_of_outputs_of_one_number_a_sample_choices_are_seen() -> None:
    model = Net(lambda m, x: m.a(x).squeeze(1), a=nn.Linear(4, 1))

    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return (z[:, None] - z[None] + 0.5).relu().mean()

    assert follow(model, [data(n) for n in (6, 7)], loss).refused
