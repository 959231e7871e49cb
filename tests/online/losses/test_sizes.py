"""What a loss is multiplied by goes with the number of samples, or does not: seen in batches of two sizes."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder import AttributionError, CurvatureProbe
from secorder._torch.graph import tells_recomputation
from secorder.online.losses.powers import Path
from secorder.online.losses.sizes import Sizes, as_a_mean

from ...helpers import data, make, reference
from ...reference import assert_all_close
from ..loops import Followed, follow

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

#: A loss of outputs and labels.
Criterion = Callable[[Tensor, Tensor], Tensor]


def followed(criterion: Criterion, told: str, *sizes: int) -> Followed:
    """A loop over batches of several sizes, of which the third and those from the fifth on are not looked at anyway."""
    return follow(make(), [data(n) for n in sizes], lambda m, b: criterion(m(b[0]), b[1]), reduction=told)


#: By what is told, losses that are as told only in batches of 6 samples.
BY_CHANCE: dict[str, tuple[Criterion, str, str]] = {
    "a constant times a mean": (lambda z, t: 6 * F.cross_entropy(z, t), "sum", 'pass reduction="mean"'),
    "a sum by a constant": (
        lambda z, t: F.cross_entropy(z, t, reduction="sum") / 6,
        "mean",
        "the same number (0.1667)",
    ),
    "of two terms": (lambda z, t: (F.cross_entropy(z, t, reduction="sum") + z.square().sum()) / 6, "mean", '"sum"'),
    "one of two terms": (lambda z, t: F.cross_entropy(z, t) + z.square().sum() / 12, "mean", 'reduction="sum"'),
    "for all numbers": (lambda z, t: (z - F.one_hot(t, 3)).square().sum() / 18, "mean", 'reduction="sum"'),
}


@pytest.mark.parametrize("name", BY_CHANCE)
@pytest.mark.parametrize("sizes", [(6, 6, 5), (6, 6, 6, 6, 6, 4)], ids=str)
def test_a_constant_is_told_from_the_number_of_samples_by_a_batch_of_another_size(
    name: str, sizes: tuple[int, ...]
) -> None:
    criterion, told, says = BY_CHANCE[name]
    came = followed(criterion, told, *sizes)
    assert came.refused
    assert all(says in reason for reason in came.refused.values()), came.refused


#: What stays as it is told, by batches of sizes of which one is a constant in the loss.
AS_TOLD: dict[str, tuple[Criterion, str]] = {
    "a constant times a mean": (lambda z, t: 5 * F.cross_entropy(z, t), "mean"),
    "a part": (lambda z, t: F.cross_entropy(z, t) + 0.5 * z.square().sum(1).mean(), "mean"),
    "halves, as large as sizes": (lambda z, t: 6 * F.cross_entropy(z, t) + 5 * z.square().sum() / len(z), "mean"),
    "the square of a temperature": (lambda z, t: 9 * F.cross_entropy(z / 3, t), "mean"),
    "a sum": (lambda z, t: F.cross_entropy(z, t, reduction="sum") + 0.2 * z.square().sum(), "sum"),
    "a mean times the number": (lambda z, t: (F.cross_entropy(z, t) + z.square().mean()) * len(z), "sum"),
}


@pytest.mark.parametrize("name", AS_TOLD)
def test_what_is_as_told_in_all_sizes_is_exact(name: str) -> None:
    criterion, told = AS_TOLD[name]
    came = follow(
        make(),
        [data(n) for n in (7, 5, 6, 9, 3)],
        lambda m, b: criterion(m(b[0]), b[1]),
        reduction=told,
    )
    assert came.exact, came.refused
    assert not came.warned


#: Of micro-batches of ``n`` samples of ``total`` whose gradients are added up.
SHARES: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "times its share": lambda z, t, n, total: F.cross_entropy(z, t) * (n / total),
    "times and divided": lambda z, t, n, total: F.cross_entropy(z, t) * n / total,
    "a tensor": lambda z, t, n, total: torch.tensor(n / total).to(z) * F.cross_entropy(z, t),
    "term by term": lambda z, t, n, total: F.cross_entropy(z, t) * (n / total) + z.square().mean() * n / total,
    "a sum by the total": lambda z, t, _, total: F.cross_entropy(z, t, reduction="sum") / total,
    "each by the total": lambda z, t, _, total: (F.cross_entropy(z, t, reduction="none") / total).sum(),
    "by all numbers": lambda z, t, _, total: (z - F.one_hot(t, 3)).square().sum() / (total * 3),
}


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("sizes", [(4, 4, 2), (3, 5, 4), (7, 6), (5, 5, 5, 2), (4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("told", ["mean", "sum"])
def test_micro_batches_that_are_weighted_by_their_sizes(name: str, sizes: tuple[int, ...], told: str) -> None:
    """Refused, and exact where it is told."""
    model, batches, total = make(), [data(n) for n in sizes], sum(sizes)
    probe = CurvatureProbe(model, reduction=told)  # type: ignore[arg-type]
    exact = CurvatureProbe(model, reduction="sum", loss_scale=1 / total)
    for _ in range(2):
        model.zero_grad()
        for x, t in batches:
            SHARES[name](model(x), t, len(x), total).backward()
    with pytest.raises(AttributionError):
        probe.fisher_diagonal()
    if name not in ("term by term", "by all numbers"):
        whole = tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True))
        assert_all_close(exact.fisher_diagonal().by_parameter(), reference(model, whole))


def test_a_sum_of_batches_of_several_sizes_is_told_what_to_pass() -> None:
    came = follow(make(), [data(n) for n in (4, 4, 2)], lambda m, b: F.cross_entropy(m(b[0]), b[1]) * (len(b[0]) / 10))
    assert all('reduction="sum", and loss_scale=' in x and "(0.1)" in x for x in came.refused.values()), came.refused


def test_the_root_of_the_number_of_samples_makes_neither_a_mean_nor_a_sum() -> None:
    def loss(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, reduction="sum") / len(z) ** 0.5

    assert followed(loss, "mean", 6, 5).refused
    came = followed(loss, "sum", 6, 5)
    assert came.refused
    assert all("the root of their number" in reason for reason in came.refused.values()), came.refused


#: Losses with a constant that is as large as the number of samples, or one over it; what is told, and what to pass.
CONSTANTS: dict[str, tuple[Criterion, str, str]] = {
    "a sum": (lambda z, t: F.cross_entropy(z, t, reduction="sum") / 2, "mean", 'reduction="sum"'),
    "a term": (lambda z, t: F.cross_entropy(z, t) + 0.5 * z.square().sum(), "mean", 'reduction="sum"'),
    "by ranks": (lambda z, t: F.cross_entropy(z, t, reduction="sum") / 8, "mean", 'reduction="sum"'),
    "a mean": (lambda z, t: 2 * F.cross_entropy(z, t), "sum", 'reduction="mean"'),
    "a mean of numbers": (lambda z, t: 2 * (z - 1).square().mean(), "sum", 'reduction="mean"'),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_may_be_a_constant_where_all_batches_are_of_as_few_samples(name: str) -> None:
    loss, told, says = CONSTANTS[name]

    def warned(*sizes: int, **options: object) -> list[str]:
        model = make()
        with CurvatureProbe(model, reduction=told, **options) as probe:  # type: ignore[arg-type]
            for x, t in map(data, sizes):
                model.zero_grad()
                loss(model(x), t).backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                probe.fisher_diagonal()
        return [str(x.message) for x in caught if "every batch" in str(x.message) and says in str(x.message)]

    assert warned(2, 2, 2)
    assert not warned(2, 2, 2, loss_scale=1.0)


#: What goes with the number of samples, by what is told.
OF_FEW: dict[str, Criterion] = {
    "mean": lambda z, t: F.cross_entropy(z, t, reduction="sum") / len(z),
    "sum": lambda z, t: F.cross_entropy(z, t) * len(z),
}


@pytest.mark.parametrize("told", OF_FEW)
def test_what_few_samples_leave_open_is_told_by_batches_of_another_size(told: str) -> None:
    said = followed(OF_FEW[told], told, 2, 2, 2).warned
    assert any("every batch had 2 samples" in x for x in said)
    for sizes in ((2, 2, 3), (3, 2, 2, 2), (8, 8, 8)):
        came = followed(OF_FEW[told], told, *sizes)
        assert came.exact
        assert not came.warned


def test_one_more_batch_is_looked_at() -> None:
    sizes = Sizes()
    assert not sizes.wants(4)
    path = Path(scale=0.25, mean=True)
    assert not sizes.differ([path], "mean", 4)
    assert [sizes.wants(n) for n in (4, 1, 3)] == [False, False, True]
    assert not sizes.differ([path], "mean", 3)
    assert sizes.agree
    assert not sizes.wants(2)
    assert "pass reduction=" in sizes.differ([path._replace(scale=0.125)], "mean", 2)
    assert not sizes.agree
    assert not sizes.differ([path._replace(scale=0.3)], "mean", 2)


def test_what_a_path_multiplies_a_mean_by() -> None:
    assert as_a_mean(Path(scale=0.5, mean=True), 6) == 0.5
    assert as_a_mean(Path(scale=0.5), 6) == 3.0
