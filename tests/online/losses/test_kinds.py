"""A loss that is another one between two looks is looked at, too, and what counts of it is counted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CurvatureProbe
from secorder._torch.graph import tells_recomputation

from ...helpers import Net, mlp, no_warnings
from ...reference import assert_all_close
from ..loops import Followed, follow

pytestmark = [
    pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing"),
    pytest.mark.filterwarnings("ignore::secorder.CurvatureWarning"),
]

#: A loss of logits, shape (N, 3) or (N, T, 3), and labels.
Criterion = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), t.flatten())


def apart(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, reduction="none")


def counted(z: Tensor, t: Tensor) -> Tensor:
    """The mean over labels that are none of -100, in the way of many scripts."""
    counts = (t != -100).double()
    return (apart(z, t.clamp(min=0)) * counts).sum() / counts.sum()


def selected(z: Tensor, t: Tensor) -> Tensor:
    return apart(z, t.clamp(min=0))[t != -100].mean()


def followed(
    once: Criterion, usual: Criterion = cross_entropy, at: int = 5, labels: Callable[[Tensor], Tensor] = torch.clone,
    shape: tuple[int, ...] = (6,), **options: Any,
) -> Followed:  # fmt: skip
    """Ten steps, of which one, which is not looked at, has another loss, or other labels; losses of one are alike."""
    batches = []
    for number in range(10):
        t = torch.randint(3, shape)
        batches.append((torch.randn(*shape, 4), labels(t) if number == at - 1 else t, number == at - 1))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, t, other = batch
        return (once if other and len(x) > 1 else usual)(model(x), t)

    def alone(batch: Any) -> list[Any]:
        x, t, other = batch
        return [(x[n : n + 1], t[n : n + 1], other) for n in range(len(x)) if bool((t[n] != -100).any())]

    return follow(mlp(), batches, loss, alone, **options)


@pytest.mark.parametrize("at", [3, 5, 7])
@pytest.mark.parametrize(
    ("once", "why"),
    [
        (lambda z, t: F.cross_entropy(z, t, reduction="sum"), "is the sum"),
        (lambda z, t: apart(z, t).sum(), "is the sum"),
        (lambda z, t: F.cross_entropy(z, t, weight=torch.tensor([1.0, 2, 5]).to(z)), "class weights"),
        (lambda z, t: F.cross_entropy(z, t) + z.std(), "couples"),
        (lambda z, t: F.cross_entropy(z - z.mean(0), t), "couples"),
        (lambda z, t: apart(z, t).topk(2)[0].mean(), "couples"),
        (lambda z, t: (apart(z, t) * torch.arange(1.0, 7).to(z)).sum() / 21, "weights its samples"),
        (lambda z, t: selected(z, torch.where(torch.arange(6) < 3, -100, t)), "weights its samples"),
    ],
)
def test_another_loss_once_is_told(once: Criterion, why: str, at: int) -> None:
    came = followed(once, selected if "selected" in once.__code__.co_names else cross_entropy, at)
    assert sorted(came.refused) == ["0", "2", "4"]
    assert all(why in reason for reason in came.refused.values())


@pytest.mark.parametrize(
    "other",
    [
        lambda z, t: F.mse_loss(z, F.one_hot(t, 3).to(z)),
        lambda z, t: F.cross_entropy(z * 2, t) * 3,
        lambda z, t: apart(z, t).mean(),
    ],
)
def test_another_mean_over_samples_is_as_good(other: Criterion) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, t, turns = batch
        return (other if bool(turns[0]) else cross_entropy)(model(x), t)

    batches = [(torch.randn(6, 4), torch.randint(3, (6,)), torch.full((6,), number == 4)) for number in range(10)]
    assert follow(mlp(), batches, loss).exact


def first_half(t: Tensor) -> Tensor:
    return torch.where(torch.arange(len(t)).view(-1, *[1] * (t.dim() - 1)) < len(t) // 2, -100, t)


def last_ones_of_the_first(t: Tensor) -> Tensor:
    return torch.where((torch.arange(len(t))[:, None] == 0) & (torch.arange(t.shape[1]) > 1), -100, t)


def last_ones(t: Tensor) -> Tensor:
    """As many of each."""
    return torch.where(torch.arange(t.shape[1]) > 1, -100, t)


@pytest.mark.parametrize(
    ("loss", "labels", "shape", "exact"),
    [
        (cross_entropy, first_half, (6,), False),
        (counted, first_half, (6,), False),
        (selected, first_half, (6,), False),
        (cross_entropy, last_ones_of_the_first, (6, 4), False),
        (cross_entropy, last_ones, (6, 4), True),
        (lambda z, t: F.cross_entropy(z.transpose(1, 2), t), last_ones_of_the_first, (6, 4), False),
        (lambda z, t: F.cross_entropy(z.transpose(1, 2), t), last_ones, (6, 4), True),
        (lambda z, t: F.cross_entropy(z, t) / 4, first_half, (6,), False),
        (lambda z, t: counted(z, t) * 2 + 0 * z.sum(), first_half, (6,), False),
    ],
)
def test_labels_that_do_not_count_in_one_batch(
    loss: Criterion, labels: Callable[[Tensor], Tensor], shape: tuple[int, ...], exact: bool
) -> None:
    came = followed(loss, loss, labels=labels, shape=shape)
    assert came.exact == exact
    assert exact or sorted(came.refused) == ["0", "2", "4"]
    assert followed(loss, loss, shape=shape).exact


def test_a_loss_in_a_checkpoint_is_not_computed_once_more_for_it() -> None:
    calls = []

    def counting(z: Tensor, t: Tensor) -> Tensor:
        calls.append(len(z))
        return F.cross_entropy(z, t)

    model = mlp()
    with CurvatureProbe(model, reduction="mean"):
        for _ in range(5):
            checkpoint(counting, model(torch.randn(6, 4)), torch.randint(3, (6,)), use_reentrant=False).backward()
        calls.clear()
        for _ in range(2):
            checkpoint(counting, model(torch.randn(6, 4)), torch.randint(3, (6,)), use_reentrant=False).backward()
    assert len(calls) == 4


def test_a_loss_that_was_refused_is_once_reset_has_been_called() -> None:
    model = mlp()
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(4):
            z = model(torch.randn(6, 4))
            (F.cross_entropy(z, torch.randint(3, (6,))) + z.std()).backward()
        for _ in range(2):
            with pytest.raises(AttributionError, match="couples"):
                probe.fisher_diagonal()
            probe.reset()
            z = model(torch.randn(6, 4))  # of the fifth batch, and the sixth: no look falls on them
            (F.cross_entropy(z, torch.randint(3, (6,))) + z.std()).backward()


def test_losses_of_several_forwards_are_looked_at_when_they_come_again() -> None:
    """Of forwards that are not looked at as they end, that their losses are joined is seen too late."""
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x)) + x), a=nn.Linear(4, 4), b=nn.Linear(4, 3))

    def backward(joined: bool) -> None:
        (x, t), (y, s) = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (6, 5)]
        one, other = model(x), model(y)
        means = F.cross_entropy(one, t) + F.cross_entropy(other, s)
        (means + (one.mean() * other.mean() if joined else 0)).backward()

    with CurvatureProbe(model, reduction="mean", forwards="separate", loss_scale=1) as probe:
        for number in range(14):
            backward(joined=number > 9)
        with pytest.raises(AttributionError, match="couples"):
            probe.fisher_diagonal()


def test_a_backward_pass_that_begins_at_the_edge_of_a_graph() -> None:
    model, x, t = mlp(), torch.randn(6, 4), torch.randint(3, (6,))
    with CurvatureProbe(model, reduction="mean") as probe, no_warnings():
        for _ in range(6):
            loss = F.cross_entropy(model(x), t)
            torch.autograd.backward([get_gradient_edge(loss)], [torch.ones_like(loss)])
        found = probe.fisher_diagonal().by_parameter()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(x), t).backward()
        assert_all_close(found, probe.fisher_diagonal().by_parameter())


def test_where_the_probe_is_strict_labels_that_do_not_count_raise_at_once() -> None:
    with pytest.raises(AttributionError, match="do not count"):
        followed(cross_entropy, labels=first_half, strict=True)
