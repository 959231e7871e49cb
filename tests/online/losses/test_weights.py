"""A loss of the model's outputs that weights its samples, as far as its operations tell, is refused as a mean."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from secorder import CurvatureProbe
from secorder._torch.graph import tells_recomputation
from secorder.online.reading import unreadable

from ...helpers import Net, data, make
from ..loops import follow, rows

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

WEIGHTS = torch.tensor([1.0, 2.0, 5.0])

#: A loss of logits, and of labels of which some may be ignored.
Criterion = Callable[[Tensor, Tensor], Tensor]


def tokens() -> Net:
    """Positions depend on those before, so that samples are told apart from them."""
    return Net(lambda m, x: m.head(torch.tanh(m.table(x).cumsum(1))), table=nn.Embedding(7, 4), head=nn.Linear(4, 3))


def sequences(padded: str) -> list[Any]:
    found = []
    for n, t in ((4, 5), (2, 5), (6, 4), (3, 7)):
        labels = torch.randint(3, (n, t))
        if padded == "ends":
            labels[torch.arange(t) > 1 + torch.arange(n)[:, None] % (t - 1)] = -100
        if padded == "starts":
            labels[:, :2] = -100
        found.append((torch.randint(7, (n, t)), labels))
    return found


def by_token(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), t.flatten(), **options)


def masked(z: Tensor, t: Tensor) -> Tensor:
    mask = (t >= 0).to(z)
    return (by_token(z, t, reduction="none").view_as(mask) * mask).sum() / mask.sum()


def packed(z: Tensor, t: Tensor) -> Tensor:
    """As many of the first tokens as are not ignored."""
    lengths = (t >= 0).sum(1)
    return pack_padded_sequence(z, lengths, batch_first=True, enforce_sorted=False).data.square().mean()


@pytest.mark.parametrize(
    ("criterion", "says"),
    [
        (by_token, "not ignored"),
        (lambda z, t: F.cross_entropy(z.transpose(1, 2), t), "not ignored"),
        (lambda z, t: by_token(z, t, reduction="sum") / (t >= 0).sum(), "divided by"),
        (masked, "add up to one"),
        (lambda z, t: -((z.log_softmax(-1)[..., 0] * (t >= 0)).sum()) / (t >= 0).sum(), "add up to one"),
        (lambda z, t: by_token(z, t, reduction="none").where(t.flatten() >= 0, torch.nan).nanmean(), "divided by"),
        (lambda z, t: (by_token(z, t, reduction="sum") + z[t >= 0].square().sum()) / (t >= 0).sum(), "divided by"),
        (lambda z, t: F.cross_entropy(z[t >= 0], t[t >= 0]), "were selected"),
        (lambda z, t: F.cross_entropy(z[t >= 0], t[t >= 0], reduction="sum") / (t >= 0).sum(), "were selected"),
        (lambda z, t: z.square().masked_select(t[..., None] >= 0).mean(), "were selected"),
        (lambda z, t: F.mse_loss(z[t >= 0], F.one_hot(t[t >= 0], 3).to(z)), "were selected"),
        (packed, "were selected"),
    ],
    ids=[
        "flat",
        "channels",
        "a sum",
        "masked",
        "negative",
        "of numbers",
        "sums",
        "by a mask",
        "a sum by a mask",
        "selected",
        "squares",
        "packed",
    ],
)
def test_means_over_tokens_with_padding(criterion: Criterion, says: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return criterion(m(b[0]), b[1])

    came = follow(tokens(), sequences("ends"), loss, layer_types="all")
    assert came.refused.keys() == {"table", "head"}
    assert all(says in reason and "token_weights" in reason for reason in came.refused.values())
    assert follow(tokens(), sequences("starts"), loss, layer_types="all").exact
    assert follow(tokens(), sequences(""), loss, layer_types="all").exact


def test_weights_that_are_told_are_taken() -> None:
    model = Net(lambda m, x, t: m.inner(x), inner=tokens())
    came = follow(
        model,
        sequences("ends"),
        lambda m, b: by_token(m(*b), b[1]),
        layer_types="all",
        reduction=lambda x, t: (t >= 0).sum(1) / (t >= 0).sum(),
    )
    assert came.exact


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights(smoothing: float) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1], weight=WEIGHTS.to(b[0]), label_smoothing=smoothing)

    came = follow(make(), [data(n) for n in (6, 7)], loss)
    assert came.refused
    assert all("class weights" in reason for reason in came.refused.values())


def of_sample(z: Tensor) -> Tensor:
    """A weight of each sample, all of them in no round proportion."""
    return torch.linspace(0.3, 1.9, len(z)).to(z)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda losses, w: (losses * w).sum() / w.sum(),
        lambda losses, w: (losses * w / w.sum()).sum(),
        lambda losses, w: (losses * (w / w.sum())).sum(),
        lambda losses, w: losses @ (w / w.sum()),
        lambda losses, w: torch.einsum("n,n->", losses, w) / w.sum(),
        lambda losses, w: -(w[:, None] / w.sum() * -losses[:, None]).sum(),
        lambda losses, w: ((losses * w).sum() + (losses.square() * w).sum()) / w.sum(),
        lambda losses, w: (torch.stack([losses, losses.square()], 1).mean(1) * w).sum() / w.sum(),
        lambda losses, w: (losses * w / w.mean()).mean(),
        lambda losses, w: (losses * (w / w.mean())).sum() / len(w),
        lambda losses, w: (losses * w).mean() / w.mean(),
        lambda losses, w: losses.square().mean() + 0.3 * (losses * (w / w.mean())).mean(),
        lambda losses, w: 0.3 * (losses * w).sum() / w.sum() + losses.square().mean(),
        lambda losses, w: F.binary_cross_entropy(torch.exp(-losses), torch.zeros_like(losses), w / w.mean()),
        lambda losses, w: (w[:, None] * torch.stack([losses, losses.square()], 1)).sum() / w.sum(),
    ],
    ids=[
        "divided",
        "elements",
        "weights",
        "a product",
        "einsum",
        "columns",
        "two terms",
        "averaged",
        "by their mean",
        "by their mean before",
        "means",
        "a term by their mean",
        "a term by their sum",
        "of PyTorch's loss",
        "of several columns",
    ],
)
@pytest.mark.parametrize("told", ["mean", "sum"])
def test_weights_that_add_up_to_one(criterion: Criterion, told: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return criterion(F.cross_entropy(z, b[1], reduction="none"), of_sample(z))

    came = follow(make(), [data(n) for n in (6, 7)], loss, reduction=told)
    assert came.refused
    assert all("token_weights" in reason for reason in came.refused.values())


@pytest.mark.parametrize("told", ["mean", "sum"])
def test_weights_that_backward_is_given(told: str) -> None:
    model = make()
    with CurvatureProbe(model, reduction=told) as probe:
        for n in (6, 7):
            x, t = data(n)
            losses = F.cross_entropy(model(x), t, reduction="none")
            losses.backward(of_sample(losses) / of_sample(losses).sum())
        assert all("token_weights" in reason for reason in unreadable(probe._fisher).values())
        assert unreadable(probe._fisher)


@pytest.mark.parametrize("told", ["mean", "sum"])
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum])
def test_weights_of_what_was_added_up_before_weight_no_losses(reduce: Any, told: str) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return reduce(F.cross_entropy(z, b[1], reduction=told) * of_sample(z))

    came = follow(make(), [data(n) for n in (6, 7)], loss, reduction=told)
    assert came.refused
    assert all("before they are added up" in reason for reason in came.refused.values())


def test_an_average_of_one_mean_is_that() -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        return (F.cross_entropy(z, b[1]) * of_sample(z)).sum() / of_sample(z).sum()

    assert follow(make(), [data(n) for n in (6, 7)], loss).exact


@pytest.mark.parametrize("told", ["mean", "sum"])
def test_weights_within_a_sample_are_its_loss_s_own(told: str) -> None:
    """As those of errors in order are, which add up to one, and are a multiple of the samples as many."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        losses = torch.stack([z.sort()[0] @ torch.tensor([0.1, 0.2, 0.3, 0.4]).to(z) for z in m(b[0])[:, [0, 1, 2, 0]]])
        return losses.mean() if told == "mean" else losses.sum()

    assert follow(make(), [data(n) for n in (2, 4, 2)], loss, reduction=told).exact


#: Of which each is a mean, or a half of one.
MEANS: dict[str, Criterion] = {
    "equal weights": lambda z, t: F.cross_entropy(z, t, weight=torch.full((3,), 2.0).to(z)),
    "of positives": lambda z, t: F.binary_cross_entropy_with_logits(z, F.one_hot(t, 3).to(z), pos_weight=WEIGHTS.to(z)),
    "a sum": lambda z, t: F.cross_entropy(z, t, reduction="sum") / len(z),
    "over elements": lambda z, _: z.square().sum() / z.numel(),
    "a half": lambda z, _: z.square().sum() / (2 * len(z)),
    "by classes, then samples": lambda z, _: z.square().sum() / 2 / len(z),
    "a hinge": lambda z, _: z.relu().sum() / len(z),
    "at a temperature": lambda z, t: F.cross_entropy(z / 3, t) / 3,
    "of several": lambda z, t: torch.stack([F.cross_entropy(z * k, t) for k in (1, 2, 3)]).sum() / 3,
    "soft labels": lambda z, t: -(F.one_hot(t, 3) * z.log_softmax(1)).sum() / len(z),
    "one of each row": lambda z, t: -z.log_softmax(1)[torch.arange(len(z)), t].mean(),
    "some classes": lambda z, _: z[:, torch.tensor([2, 0])].square().mean(),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_are_left_alone(name: str) -> None:
    assert follow(make(), [data(n) for n in (6, 7, 5, 3)], lambda m, b: MEANS[name](m(b[0]), b[1])).exact


def test_a_mean_over_selected_times_is_left_alone() -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return m(b[0])[torch.tensor([2, 0, 1])].square().mean()

    times_first = [(torch.randn(5, n, 4),) for n in (4, 2, 4, 7)]
    assert follow(make(), times_first, loss, lambda b: rows(b, 1), sample_dim=1).exact


def test_weights_of_classes_of_which_there_are_as_many_are_left_alone() -> None:
    """They average to one by chance, and are no less a part of each sample's loss."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        return (F.cross_entropy(m(b[0]), b[1], reduction="none") * torch.tensor([0.5, 1.0, 1.5]).to(b[0])[b[1]]).mean()

    x, t = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    assert follow(make(), [(x, t)], loss).exact
