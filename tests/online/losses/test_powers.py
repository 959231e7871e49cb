"""A loss is a mean over samples where 1/N comes in on each path from it to the outputs, and a sum where on none."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder._torch.graph import tells_recomputation
from secorder._torch.loss_graph import place_of
from secorder.layers.layout import DIM_ZERO
from secorder.online.losses import powers
from secorder.online.losses.marks import Output
from secorder.online.losses.powers import differ, paths_of, reduced_otherwise
from secorder.online.losses.seen import SeenLoss, see
from secorder.online.reading import unreadable

from ...helpers import Net, data, make
from ..loops import Followed, follow

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

#: A loss of outputs, shape (N, 3), and labels.
Criterion = Callable[[Tensor, Tensor], Tensor]


def followed(criterion: Criterion, told: str, *sizes: int, **options: Any) -> Followed:
    batches = [data(n) for n in sizes or (6, 7)]
    return follow(make(), batches, lambda m, b: criterion(m(b[0]), b[1]), reduction=told, **options)


#: Losses of samples, one or more numbers each, before they are added up or averaged.
OF_SAMPLES: dict[str, Criterion] = {
    "cross entropy": lambda z, t: F.cross_entropy(z, t, reduction="none"),
    "squares": lambda z, t: (z - F.one_hot(t, 3)) ** 2,
    "a library's squares": lambda z, t: F.mse_loss(z, F.one_hot(t, 3).to(z), reduction="none"),
    "binary": lambda z, t: F.binary_cross_entropy_with_logits(z, F.one_hot(t, 3).to(z), reduction="none"),
    "gathered": lambda z, t: -z.log_softmax(1).gather(1, t[:, None]),
    "products": lambda z, _: z * z.sigmoid(),
    "averaged": lambda z, t: F.mse_loss(z, F.one_hot(t, 3).to(z), reduction="none").mean(1),
    "indexed": lambda z, t: -z.log_softmax(1)[torch.arange(len(z)), t],
    "a column": lambda z, _: z[:, 0].square(),
}


@pytest.mark.parametrize("name", OF_SAMPLES)
@pytest.mark.parametrize(("kind", "told"), [("sum", "mean"), ("sum", lambda x: None), ("mean", "sum")])
def test_a_sum_is_no_mean_and_a_mean_no_sum(name: str, kind: str, told: Any) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return getattr(OF_SAMPLES[name](m(b[0]), b[1]), kind)()

    came = follow(make(), [data(n) for n in (6, 7)], loss, reduction=told)
    assert came.refused
    assert all(f'pass reduction="{kind}"' in reason for reason in came.refused.values())


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_a_reduction_of_pytorch_is_seen_beside_others(kind: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        penalty = z.square().sum() if kind == "sum" else z.square().mean()
        return penalty - F.cross_entropy(z, b[1], reduction=kind)

    told = {"sum": "mean", "mean": "sum"}[kind]
    assert follow(make(), [data(6)], loss, reduction=told).refused
    if kind == "sum":
        assert follow(make(), [data(6), data(5)], loss, reduction="sum").exact


def divergence(z: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a Gaussian from the standard one, as autoencoders have it."""
    return -0.5 * reduce(1 + z - z.pow(2) - z.exp())


@pytest.mark.parametrize(("reduce", "kind"), [(torch.sum, "sum"), (torch.mean, "mean")])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_factor_that_is_far_from_the_number_of_samples_makes_no_mean(reduce: Any, kind: str, sign: int) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return F.cross_entropy(z, b[1], reduction=kind) + sign * divergence(z, reduce) / 2

    told = {"sum": "mean", "mean": "sum"}[kind]
    came = follow(make(), [data(6), data(7)], loss, reduction=told)
    assert all(f'pass reduction="{kind}"' in reason for reason in came.refused.values())
    assert came.refused
    assert follow(make(), [data(6), data(7)], loss, reduction=kind).exact


#: Means that end in a sum, for a number within is divided, or a mean already.
SUMS: dict[str, Criterion] = {
    "divided": lambda z, t: (F.cross_entropy(z, t, reduction="none") / len(z)).sum(),
    "weights": lambda z, t: (F.cross_entropy(z, t, reduction="none") * torch.full((len(z),), 1 / len(z)).to(z)).sum(),
    "a product": lambda z, t: F.cross_entropy(z, t, reduction="none") @ torch.full((len(z),), 1 / len(z)).to(z),
    "averaged": lambda z, _: z.square().mean(0).sum(),
    "scaled outputs": lambda z, t: F.mse_loss(z / len(z) ** 0.5, torch.zeros_like(z), reduction="sum"),
    "divided twice": lambda z, t: F.cross_entropy(z, t, reduction="sum") / 2 / len(z) * 2,
    "means": lambda z, t: torch.stack([F.cross_entropy(z, t), z.square().mean()]).sum(),
}


def all_zero(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def by_lerp(losses: Tensor) -> Tensor:
    """A running mean."""
    found = losses[0]
    for index, own in enumerate(losses[1:], start=2):
        found = torch.lerp(found, own, 1 / index)
    return found


def written(losses: Tensor) -> Tensor:
    """In a column of a table."""
    table = losses.new_zeros(len(losses), 2)
    table[:, 0] = losses
    return table


#: Operations that add up the losses of samples, or what has them added up, with a factor: by it, a sum or a mean.
LINEAR: dict[str, Callable[[Tensor, float], Tensor]] = {
    "a running sum": lambda own, by: own.cumsum(0)[-1] * by,
    "added to": lambda own, by: torch.addmm(own.new_zeros(1, 1), torch.full_like(own, by)[None], own[:, None])[0, 0],
    "a factor of a sum": lambda own, by: torch.add(own.new_zeros(()), own.sum(), alpha=by),
    "a factor of a difference": lambda own, by: -torch.sub(own.new_zeros(()), own.sum(), alpha=by),
    "a quotient added": lambda own, by: torch.addcdiv(own.new_zeros(()), own.sum(), own.new_tensor(1 / by)),
    "a product added": lambda own, by: torch.addcmul(own.new_zeros(()), own.sum(), own.new_tensor(by)),
    "at indices": lambda own, by: own.new_zeros(1).index_add(0, all_zero(own), own)[0] * by,
    "at indices, by a factor": lambda own, by: own.new_zeros(1).index_add(0, all_zero(own), own, alpha=by)[0],
    "sparse": lambda own, by: torch.sparse.mm(torch.full_like(own, by)[None].to_sparse(), own[:, None])[0, 0],
    "a trace": lambda own, by: torch.diag(own).trace() * by,
    "written in place": lambda own, by: written(own).sum() * by,
    "by the root, twice": lambda own, by: own.sum() * by**0.5 * by**0.5,
}

#: The same of which each is a mean as it is.
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "scattered": lambda own: own.new_zeros(1).scatter_reduce(0, all_zero(own), own, "mean", include_self=False)[0],
    "at indices": lambda own: own.new_zeros(1).index_reduce(0, all_zero(own), own, "mean", include_self=False)[0],
    "a running one": by_lerp,
    "a window": lambda own: F.avg_pool1d(own[None, None], len(own)).squeeze(),
    "a convolution": lambda own: F.conv1d(own[None, None], torch.full_like(own, 1 / len(own))[None, None]).squeeze(),
    "beside the variance": lambda own: torch.var_mean(own)[1],
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_factors_of_what_is_linear_are_seen_whatever_operation_it_is(name: str, kind: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        own = F.cross_entropy(m(b[0]), b[1], reduction="none")
        return LINEAR[name](own, 1.0 if kind == "sum" else 1 / len(own))

    other = {"sum": "mean", "mean": "sum"}[kind]
    assert follow(make(), [data(6), data(7)], loss, reduction=kind).exact
    came = follow(make(), [data(6), data(7)], loss, reduction=other)
    assert came.refused
    assert all(f'pass reduction="{kind}"' in reason for reason in came.refused.values())


#: Sums of what is made of the numbers of samples, in which no factor is.
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "a product of vectors": lambda d: d.flatten() @ d.flatten(),
    "a product of matrices": lambda d: torch.einsum("nc,nc->", d, d),
    "a trace of products": lambda d: (d.T @ d).trace(),
    "a column by a row": lambda d: (d[:, :1].T @ d[:, :1])[0, 0],
    "a squared norm": lambda d: d.norm() ** 2,
    "the square of a norm of rows": lambda d: torch.linalg.vector_norm(d.norm(dim=1)) ** 2,
    "a norm of the first order": lambda d: torch.linalg.vector_norm(d, 1),
    "a squared distance": lambda d: torch.dist(d, torch.zeros_like(d)) ** 2,
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_products_and_norms_add_up_without_a_factor(name: str, kind: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return MADE[name](z - F.one_hot(b[1], 3)) * (1.0 if kind == "sum" else 1 / len(z))

    other = {"sum": "mean", "mean": "sum"}[kind]
    came = follow(make(), [data(6), data(7)], loss, reduction=kind)
    assert came.exact
    assert not came.warned
    came = follow(make(), [data(6), data(7)], loss, reduction=other)
    assert came.refused
    assert all(f'pass reduction="{kind}"' in reason for reason in came.refused.values())


@pytest.mark.parametrize("name", MEANS)
def test_other_means_are_no_sums(name: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return MEANS[name](F.cross_entropy(m(b[0]), b[1], reduction="none"))

    assert follow(make(), [data(6), data(7)], loss).exact
    assert follow(make(), [data(6), data(7)], loss, reduction="sum").refused


def test_a_statistic_that_is_switched_off_hides_nothing() -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return F.cross_entropy(z, b[1]) + F.relu(-1e-9 - z.var(0, correction=0)).sum()

    came = follow(make(), [data(6), data(7)], loss)
    assert came.exact
    assert not came.warned
    assert follow(make(), [data(6), data(7)], loss, reduction="sum").refused


#: What makes one number of all outputs of one sample.
OF_ONE = {
    "a distance": torch.dist,
    "a norm": lambda z, y: (z - y).norm(),
    "a product": lambda z, y: (z * y).exp().prod(),
}


@pytest.mark.parametrize("name", OF_ONE)
def test_what_one_sample_of_a_batch_has_is_put_together_of_no_others(name: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        first = OF_ONE[name](z[0], torch.ones(3).to(z)) if len(z) > 1 or bool(torch.equal(b[0][0], start)) else 0.0
        return (first + 0 * z.sum()) / len(z)

    batch = data(6)
    start = batch[0][0]
    came = follow(make(), [batch], loss)
    assert came.exact, came.refused
    assert not came.warned


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_gradients_that_backward_is_given_are_factors(kind: str) -> None:
    """As ``loss.backward(gradient)`` is, of losses of samples."""

    def told(reduction: str) -> str:
        model = make()
        with CurvatureProbe(model, reduction=reduction) as probe:
            for n in (6, 7):
                x, t = data(n)
                F.cross_entropy(model(x), t, reduction="none").backward(
                    torch.full((n,), 1.0 if kind == "sum" else 1 / n, dtype=torch.float64)
                )
            return "".join(unreadable(probe._fisher).values())

    assert not told(kind)
    assert f'pass reduction="{kind}"' in told({"sum": "mean", "mean": "sum"}[kind])


@pytest.mark.parametrize("name", SUMS)
def test_means_that_end_in_a_sum_are_left_alone(name: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return SUMS[name](m(b[0]), b[1])

    came = follow(make(), [data(n) for n in (6, 7)], loss)
    assert came.exact, came.refused


def test_a_scale_that_is_told_makes_a_mean_of_a_sum() -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1], reduction="sum")

    assert follow(make(), [data(6), data(6)], loss, loss_scale=6.0).exact


def by_sample(z: Tensor, t: Tensor) -> list[Tensor]:
    """The mean loss of each sample, by a loop."""
    return [F.cross_entropy(own[None], label[None]) for own, label in zip(z, t, strict=True)]


def of_boxes(z: Tensor, t: Tensor) -> Tensor:
    """The sum over some samples' rows, of which there are others in each batch."""
    return (z[t > 0] - 1).abs().sum()


def parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """Three samples, and all others, of two numbers each: six numbers, as there are samples in the first batch."""
    return z[:3, :2], z[3:, :2]


#: By what is told, losses that are neither, and what is said of them.
NEITHER: dict[str, tuple[Criterion, str, str]] = {
    "a mean and a sum": (lambda z, t: F.cross_entropy(z, t) + z.square().sum(), "mean", "sums over them"),
    "a sum and a mean": (lambda z, t: F.cross_entropy(z, t, reduction="sum") + z.square().mean(), "sum", "means over"),
    "by the number of boxes": (lambda z, t: F.cross_entropy(z, t) + of_boxes(z, t) / 5, "mean", "divided by 5"),
    "means of parts": (lambda z, t: F.cross_entropy(z[:4], t[:4]) + z.square().mean(), "mean", "a mean over 4 of"),
    "means of parts of two numbers": (
        lambda z, t: sum(own.square().mean() for own in parts(z)),
        "mean",
        "over 3 of",
    ),
    "sums of parts by their numbers": (
        lambda z, t: sum(own.square().sum() / own.numel() for own in parts(z)),
        "mean",
        "over 3 of",
    ),
    "by a number": (lambda z, t: F.cross_entropy(z, t, reduction="sum") / 5, "mean", "divided by 5"),
    "times the number of samples": (lambda z, t: F.cross_entropy(z, t) * len(z), "mean", 'reduction="sum", or loss_sc'),
    "and divided": (lambda z, t: F.cross_entropy(z, t) * len(z) / 4, "mean", 'reduction="sum"'),
    "a sum by the number": (lambda z, t: F.cross_entropy(z, t, reduction="sum") / len(z), "sum", 'reduction="mean"'),
    "a loop": (lambda z, t: sum(by_sample(z, t), z.new_zeros(())), "mean", 'reduction="sum"'),
    "a loop, stacked": (lambda z, t: torch.stack(by_sample(z, t)).sum(), "mean", 'reduction="sum"'),
    "a loop of means": (lambda z, t: sum((F.mse_loss(own, 0 * own) for own in z), z.new_zeros(())), "mean", '="sum"'),
    "a loop by a number": (lambda z, t: torch.stack(by_sample(z, t)).sum() / 5, "mean", "divided by 5"),
    "a mean of a loop": (lambda z, t: torch.stack(by_sample(z, t)).mean(), "sum", 'reduction="mean"'),
    "a temperature": (lambda z, t: F.cross_entropy(z / 5, t, reduction="sum"), "mean", 'reduction="sum"'),
    "the square root as a temperature": (
        lambda z, t: F.cross_entropy(z / 6**0.5, t, reduction="sum"),
        "mean",
        '="sum"',
    ),
    "a small sum": (lambda z, t: 0.01 * F.cross_entropy(z, t, reduction="sum"), "mean", 'reduction="sum"'),
    "a mean, once for each sample": (lambda z, t: F.cross_entropy(z, t).expand(len(z)).sum(), "mean", '="sum"'),
    "a mean beside numbers of samples": (lambda z, t: (F.cross_entropy(z, t) + 0.0 * t).sum(), "mean", '="sum"'),
    "a mask after a mean": (
        lambda z, t: torch.where(t > 0, F.cross_entropy(z, t), 0.0).sum(),
        "mean",
        "numbers of each of them",
    ),
    "weights of terms": (
        lambda z, t: torch.tensor([0.7, 0.3]).to(z) @ torch.stack([z.square().sum(), z.exp().sum()]),
        "mean",
        'reduction="sum"',
    ),
}


@pytest.mark.parametrize("name", NEITHER)
def test_what_is_not_as_told_is_refused(name: str) -> None:
    criterion, told, says = NEITHER[name]
    came = followed(criterion, told)
    assert came.refused
    assert all(says in reason for reason in came.refused.values()), came.refused


#: By what is told, losses that are so.
AS_TOLD: dict[str, tuple[Criterion, str]] = {
    "a part": (lambda z, t: 0.5 * F.cross_entropy(z, t) + 0.3 * z.square().sum(1).mean(), "mean"),
    "a part of a sum": (lambda z, t: F.cross_entropy(z, t, reduction="sum") + 0.3 * z.square().sum(), "sum"),
    "some times": (lambda z, t: 16 * F.cross_entropy(z / 4, t) + z.square().mean(), "mean"),
    "one term as many times as samples": (lambda z, t: 6 * F.cross_entropy(z, t) + z.square().mean(), "mean"),
    "by all numbers": (lambda z, t: F.cross_entropy(z, t) + z.square().sum() / z.numel(), "mean"),
    "a loop by the number": (lambda z, t: sum(by_sample(z, t), z.new_zeros(())) / len(z), "mean"),
    "a loop, each by it": (lambda z, t: sum((x / len(z) for x in by_sample(z, t)), z.new_zeros(())), "mean"),
    "a loop that is summed": (lambda z, t: torch.stack(by_sample(z, t)).sum(), "sum"),
    "columns, one by one": (lambda z, t: sum((own.square().mean() for own in z.T), z.new_zeros(())), "mean"),
    "normalised within": (lambda z, t: (z - z.mean(1, keepdim=True)).square().sum(), "sum"),
    "weights of terms": (lambda z, t: z.square().sum() * 0.7 + z.exp().sum() * 0.3, "sum"),
    "an entropy": (lambda z, t: F.cross_entropy(z, t) - 0.1 * -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(), "mean"),
    "advantages": (lambda z, t: -(z.log_softmax(1)[:, 0] * (t - 1.3)).mean(), "mean"),
    "by twice the number": (lambda z, t: z.square().sum() / (2 * len(z)), "mean"),
    "times one over it": (lambda z, t: z.square().sum() * (1 / len(z)), "mean"),
    "a few rows": (lambda z, t: (z[t > 0].square().sum() + z[t == 0].abs().sum()) / len(z), "mean"),
    "parts, together": (lambda z, t: torch.cat([own.square() for own in parts(z)]).mean(), "mean"),
    "parts by the number": (lambda z, t: sum(own.square().sum() for own in parts(z)) / (2 * len(z)), "mean"),
    "parts that keep a margin": (lambda z, t: torch.cat([own.relu() for own in parts(z)]).mean(), "mean"),
    "chosen by labels, together": (lambda z, t: torch.cat([z[t > 0].square(), z[t == 0].exp()]).mean(), "mean"),
    "chosen by labels, a sum": (lambda z, t: torch.cat([z[t > 0, 0], z[t == 0, 1].exp()]).nanmean(), "mean"),
    "none chosen": (lambda z, t: F.cross_entropy(z, t) + z[t < 0].sum() / len(z), "mean"),
    "a temperature": (lambda z, t: F.cross_entropy(z * 6, t), "mean"),
    "a temperature of a sum": (lambda z, t: F.cross_entropy(z / 6, t, reduction="sum"), "sum"),
    "a mean beside losses": (lambda z, t: (F.cross_entropy(z, t) + z.square().sum(1)).mean(), "mean"),
    "a mean beside losses, in a sum": (lambda z, t: (F.cross_entropy(z, t) + z.square().sum(1)).sum(), "sum"),
    "a term that is switched off": (lambda z, t: F.cross_entropy(z, t) + 0.0 * z.square().sum(), "mean"),
}


@pytest.mark.parametrize("name", AS_TOLD)
def test_what_is_as_told_is_exact(name: str) -> None:
    criterion, told = AS_TOLD[name]
    came = followed(criterion, told)
    assert came.exact, came.refused
    assert not came.warned


def test_a_mean_over_some_samples_that_have_as_many_numbers_as_there_are_samples() -> None:
    came = followed(lambda z, _: z[torch.arange(max(len(z) - 1, 1))].square().mean(), "mean", 3)
    assert came.refused
    assert all("a mean of 2 that were selected" in reason for reason in came.refused.values())


@pytest.mark.parametrize("kind", ["means", "cross entropies", "sums"])
def test_the_mean_of_halves_means_is_one_of_all(kind: str) -> None:
    """As of real and fake images in one batch."""

    def mean(z: Tensor, t: Tensor) -> Tensor:
        if kind == "cross entropies":
            return F.cross_entropy(z, t)
        return z.square().mean() if kind == "means" else z.square().sum() / z.numel()

    def loss(m: nn.Module, b: Any) -> Tensor:
        z, t = m(b[0])[:, :2], b[1] % 2
        return sum(map(mean, z.chunk(2), t.chunk(2)), z.new_zeros(())) / 2 if len(z) > 1 else mean(z, t)

    came = follow(make(), [data(n) for n in (6, 8)], loss)
    assert came.exact, came.refused
    assert not came.warned


def test_a_mean_of_which_the_gradient_comes_to_one_sample_is_one_beside_another() -> None:
    """As where all others keep a margin."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return z[:, 0].mul(b[1] == 1).mean() + z.square().mean()

    assert follow(make(), [(data(n)[0], (torch.arange(n) == 1).long()) for n in (6, 7)], loss).exact


def test_a_mean_of_which_the_gradient_comes_to_one_sample_is_one_beside_as_many_as_samples() -> None:
    """As of clipped ratios of probabilities, beside an entropy and the loss of a value."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return (
            z.gather(1, b[1][:, None]).mul((b[1] == 1)[:, None]).mean() + z[:, :1].exp().mean() + z[:, 1:2].cos().mean()
        )

    assert follow(make(), [(data(n)[0], (torch.arange(n) == 1).long()) for n in (3, 2)], loss).exact


def test_a_mask_that_leaves_one_sample_is_no_mean() -> None:
    came = followed(lambda z, t: (z.square().sum(1) * torch.tensor([0.0, 1.0]).to(z)).sum(), "mean", 2)
    assert came.refused


def test_weights_that_are_learnt_are_constants_of_the_loss() -> None:
    """Kendall et al. (2018)."""

    def loss(m: Any, b: Any) -> Tensor:
        z, s = m(b[0]), m.spread
        return torch.exp(-s[0]) * F.cross_entropy(z, b[1]) + s.sum() + torch.exp(-s[1]) * z.square().sum(1).mean()

    model = Net(lambda m, x: m.head(x), head=nn.Linear(4, 3))
    model.spread = nn.Parameter(torch.tensor([0.3, -0.4]))
    assert follow(model, [data(6), data(7)], loss).exact
    assert follow(model, [data(6)], lambda m, b: len(b[0]) * loss(m, b)).refused


@pytest.mark.parametrize(
    ("number", "told", "warned"), [(11, "sum", True), (4, "sum", False), (11, "mean", None), (12, "mean", False)]
)
def test_a_number_that_may_be_a_constant_or_one_of_the_batch(number: int, told: str, warned: bool | None) -> None:
    def loss(m: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1], reduction="sum") / (
            number if len(b[0]) > 1 else number / 6 ** (told == "mean")
        )

    came = follow(make(), [data(6)], loss, reduction=told)
    if warned is None:
        assert came.refused
    else:
        assert came.exact
        assert any(f"divided by {number}" in said for said in came.warned) is warned


def test_a_scale_that_is_told_says_that_factors_are_constants() -> None:
    assert followed(lambda z, t: 6 * F.cross_entropy(z, t), "mean", 6).refused
    assert not followed(lambda z, t: 6 * F.cross_entropy(z, t), "mean", 6, loss_scale=1.0).refused


def seen(criterion: Callable[[Tensor], Tensor], z: Tensor) -> SeenLoss:
    found = see(
        {place_of(criterion(z)): torch.ones(())}, {0: {place_of(z): Output(DIM_ZERO, 1.0, len(z))}}, joined=False
    )
    assert found is not None
    return found


def test_powers_of_the_number_of_samples() -> None:
    z = torch.randn(6, 2, requires_grad=True) * 1.0
    for criterion, expected in (
        (lambda z: z.sum(), {0}),
        (lambda z: z.mean(), {-1}),
        (lambda z: z.mean(1).sum(), {0}),
        (lambda z: z.mean(0).sum(), {-1}),
        (lambda z: z.mean() + z.exp().sum(), {-1, 0}),
        (lambda z: z.exp().mean() / 6, {-2}),
    ):
        assert {path.power for path in paths_of(seen(criterion, z), 6, "mean")} == expected


def test_what_paths_are_multiplied_by() -> None:
    z = torch.randn(6, 2, requires_grad=True) * 1.0
    for criterion, expected in (
        (lambda z: 0.3 * z.sum(), {(0.3, False, 12, False)}),
        (lambda z: 0.5 * (z.exp() * 3).mean(), {(0.5, True, 0, True)}),
        (lambda z: (z.square() / 4).sum() / 2, {(0.125, False, 12, False)}),
        (lambda z: ((z * 2).exp() * 3).sum(), {(3.0, False, 12, True)}),
    ):
        found = paths_of(seen(criterion, z), 6, "mean")
        assert {(path.scale, path.mean, path.added, path.inside) for path in found} == expected


def test_more_paths_than_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(6, 2, requires_grad=True) * 1.0

    def criterion(z: Tensor) -> Tensor:
        once = z.exp()
        return torch.stack([once * k for k in range(2, 9)]).sum()

    loss = seen(criterion, z)
    assert {path.scale for path in paths_of(loss, 6, "mean")} == {*range(2, 9)}
    monkeypatch.setattr(powers, "MOST", 6)
    assert {path.scale for path in paths_of(loss, 6, "mean")} == {1.0}


def test_numbers_of_targets() -> None:
    z = torch.randn(6, 2, requires_grad=True) * 1.0
    assert differ(seen(lambda z: z[:5].square().sum(), z), 1)
    assert not differ(seen(lambda z: z.square().sum(), z), 1)


def test_what_is_sure_and_what_is_not() -> None:
    z = torch.randn(6, 2, requires_grad=True) * 1.0

    def told(criterion: Callable[[Tensor], Tensor], reduction: str) -> tuple[str, bool]:
        loss = seen(criterion, z)
        return reduced_otherwise(loss, paths_of(loss, 6, reduction), reduction)

    assert told(lambda z: z.square().sum(), "sum") == ("", False)
    assert told(lambda z: z.square().sum(), "mean")[1]
    said, sure = told(lambda z: z.square().sum() / 11, "sum")
    assert "divided by 11" in said
    assert not sure


@pytest.mark.parametrize("counted", [True, False])
def test_a_sum_that_is_divided_by_what_was_counted_may_be_no_sum(counted: bool) -> None:
    """Also by less than there are samples: a Python number is a constant then."""

    def criterion(z: Tensor, t: Tensor) -> Tensor:
        count = (t < 3).sum().clamp(max=2)
        total: Tensor = F.cross_entropy(z, t, reduction="sum") / (count if counted else 2)
        return total

    model, (x, t) = make(), data(8)
    with CurvatureProbe(model, reduction="sum") as probe:
        criterion(model(x), t).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            probe.fisher_diagonal()
    assert any("divided by 2 for 8 samples" in str(w.message) for w in caught) is counted
