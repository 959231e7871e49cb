"""A loss of the model's outputs that weights its samples, as far as its operations tell, is refused as a mean."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder._torch.graph import tells_recomputation

from ...helpers import Net, data, make
from ..loops import follow

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


@pytest.mark.parametrize(
    ("criterion", "says"),
    [
        (by_token, "not ignored"),
        (lambda z, t: F.cross_entropy(z.transpose(1, 2), t), "not ignored"),
        (lambda z, t: by_token(z, t, reduction="sum") / (t >= 0).sum(), "divided by"),
        (masked, "divided by"),
    ],
    ids=["flat", "channels", "a sum", "masked"],
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


#: Of which each is a mean, or a half of one.
MEANS: dict[str, Criterion] = {
    "equal weights": lambda z, t: F.cross_entropy(z, t, weight=torch.full((3,), 2.0).to(z)),
    "of positives": lambda z, t: F.binary_cross_entropy_with_logits(z, F.one_hot(t, 3).to(z), pos_weight=WEIGHTS.to(z)),
    "a sum": lambda z, t: F.cross_entropy(z, t, reduction="sum") / len(z),
    "over elements": lambda z, _: z.square().sum() / z.numel(),
    "a half": lambda z, _: z.square().sum() / (2 * len(z)),
    "a hinge": lambda z, _: z.relu().sum() / len(z),
    "at a temperature": lambda z, t: F.cross_entropy(z / 3, t) / 3,
}


@pytest.mark.parametrize("name", MEANS)
def test_means_are_left_alone(name: str) -> None:
    assert follow(make(), [data(n) for n in (6, 7, 5, 3)], lambda m, b: MEANS[name](m(b[0]), b[1])).exact


def test_a_look_at_the_loss_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secorder.online.losses.coupling.tell_scaler", lambda *_: 1 / 0)
    model, (x, t) = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(x), t).backward()
        with pytest.warns(UserWarning, match=r"looking at it failed \(ZeroDivisionError"):
            probe.fisher_diagonal()
