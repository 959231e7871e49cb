"""A loss that the model returns, and what is told of how it is made."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.errors import AttributionError

from ...helpers import Net

WEIGHTS = torch.tensor([1.0, 4.0, 9.0])


def returned(criterion: Callable[[Tensor, Tensor], Tensor], *, noise: float = 0.0, also: bool = False) -> Net:
    """A model that returns a loss, alone or with its logits; with random numbers of its own in it, or none."""

    def forward(m: Net, x: Tensor, t: Tensor, **_: Any) -> Any:
        logits = m.b(m.drop(torch.tanh(m.a(x))))
        loss = criterion(logits + noise * torch.randn_like(logits) if noise else logits, t)
        return {"loss": loss, "logits": logits} if also else loss

    return Net(forward, a=nn.Linear(4, 5), drop=nn.Dropout(0.2), b=nn.Linear(5, 3))


def batch(count: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return 3 * torch.randn(count, 4), torch.arange(count) % 3


def train(model: Net, *, counts: tuple[int, ...] = (12, 12), **options: Any) -> CurvatureProbe:
    """Two steps by the loss that the model returns."""
    probe = CurvatureProbe(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in counts:
            found = model(*batch(count))
            (found["loss"] if isinstance(found, dict) else found).backward()
    return probe


def weighted(logits: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(logits, t, weight=WEIGHTS.to(logits))


def summed(logits: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(logits, t, reduction="sum")


@pytest.mark.parametrize("also", [False, True], ids=["alone", "with logits"])
@pytest.mark.parametrize("count", [2, 3, 12])
@pytest.mark.parametrize(
    ("criterion", "reduction", "says"),
    [
        (weighted, "mean", "class weights"),
        (weighted, "sum", "class weights"),
        (summed, "mean", 'reduction="sum"'),
        (F.cross_entropy, "sum", 'reduction="mean"'),
        (weighted, lambda x, t: torch.ones(len(t)) / len(t), "class weights"),
    ],
)
def test_a_loss_that_is_not_made_as_is_told_is_refused(
    criterion: Callable[[Tensor, Tensor], Tensor], reduction: Any, says: str, count: int, also: bool
) -> None:
    probe = train(returned(criterion, also=also), counts=(count, count), reduction=reduction)
    with pytest.raises(AttributionError, match=says):
        probe.fisher_diagonal()
    probe.detach()


@pytest.mark.parametrize(
    ("criterion", "reduction"),
    [
        (F.cross_entropy, "mean"),
        (summed, "sum"),
        (weighted, lambda x, t: WEIGHTS.to(x)[t] / WEIGHTS.to(x)[t].sum()),
        (lambda logits, t: F.cross_entropy(logits, t) / 4, "mean"),
        (lambda logits, t: F.cross_entropy(logits.float(), t), "mean"),
        (lambda logits, t: F.cross_entropy(logits.bfloat16(), t), "mean"),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_loss_that_is_made_as_is_told_is_measured(
    criterion: Callable[[Tensor, Tensor], Tensor], reduction: Any, noise: float
) -> None:
    for count in (1, 2, 5, 12):
        probe = train(returned(criterion, noise=noise), counts=(count, 12, 7), reduction=reduction)
        assert probe.fisher_diagonal()
        probe.detach()


@pytest.mark.parametrize("size", [1e-3, 0.5])
def test_random_numbers_in_a_loss_are_no_weights(size: float) -> None:
    """Which of the two it is cannot be seen where each part has numbers of its own."""
    probe = train(returned(weighted, noise=size), reduction="mean")
    assert probe.fisher_diagonal()
    probe.detach()


@pytest.mark.parametrize(
    "draw", [lambda n: [random.random() for _ in range(n)], numpy.random.rand], ids=["python", "numpy"]
)
def test_random_numbers_from_elsewhere_in_a_loss_are_no_weights(draw: Callable[[int], Any]) -> None:
    def forward(m: Net, x: Tensor, t: Tensor) -> Tensor:
        return weighted(m.a(x) + torch.tensor(draw(len(x))).to(x)[:, None], t)

    probe = train(Net(forward, a=nn.Linear(4, 3)), reduction="mean")
    assert probe.fisher_diagonal()
    probe.detach()


def test_a_generator_in_a_loss_is_no_weight() -> None:
    generator = torch.Generator()

    def forward(m: Net, x: Tensor, t: Tensor) -> Tensor:
        logits = m.a(x)
        noise = torch.randn(logits.shape, generator=generator.manual_seed(0), dtype=logits.dtype)
        return weighted(logits + 0.1 * noise, t)

    probe = train(Net(forward, a=nn.Linear(4, 3)), reduction="mean")
    assert probe.fisher_diagonal()
    probe.detach()


def test_a_loss_is_looked_at_without_a_warning() -> None:
    """PyTorch warns of a loss that is taken for a number."""
    model, always = returned(F.cross_entropy), torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else once a process
    try:
        with warnings.catch_warnings(record=True) as seen, CurvatureProbe(model, reduction="mean") as probe:
            warnings.simplefilter("always")
            model(*batch()).backward()
            assert probe.fisher_diagonal()
    finally:
        torch.set_warn_always(always)
    assert not seen


def test_a_loss_that_is_returned_and_not_used_is_no_matter() -> None:
    model = returned(weighted, also=True)
    probe = CurvatureProbe(model, reduction="mean")
    x, t = batch()
    F.cross_entropy(model(x, t)["logits"], t).backward()
    assert probe.fisher_diagonal()
    probe.detach()


def test_a_number_that_the_loss_is_divided_by_is_no_weight() -> None:
    """Of tokens in several batches, as trainers pass it: each part's loss is divided by the same."""

    def forward(m: Net, x: Tensor, t: Tensor, items: int) -> Tensor:
        return summed(m.a(x), t) / items

    model = Net(forward, a=nn.Linear(4, 3))
    probe = CurvatureProbe(model, reduction="mean")
    model(*batch(), items=12).backward()
    assert probe.fisher_diagonal()
    probe.detach()


@pytest.mark.parametrize(
    ("ignored", "items", "exact"),
    [(0, 36, True), (1, 24, True), (1, 36, False), (0, 72, False), (None, 30, False)],
    ids=["all", "but the first", "of which the first counts", "of two batches", "padded"],
)
def test_a_number_of_tokens_with_labels_tells_weights(ignored: int | None, items: int, exact: bool) -> None:
    """As a trainer passes them: a sum over tokens, divided by how many it has counted."""

    def forward(m: Net, x: Tensor, *, labels: Tensor, num_items_in_batch: int) -> Tensor:
        return F.cross_entropy(m.a(x).transpose(1, 2), labels, reduction="sum") / num_items_in_batch

    labels = torch.arange(36).view(12, 3) % 5
    for n in range(12 if ignored is None else 0):
        labels[n, : n % 2] = -100
    labels[:, : ignored or 0] = -100
    model = Net(forward, a=nn.Linear(4, 5))
    with CurvatureProbe(model, reduction="mean") as probe:
        model(torch.randn(12, 3, 4), labels=labels, num_items_in_batch=items).backward()
        if exact:
            assert probe.fisher_diagonal()
        else:
            with pytest.raises(AttributionError, match="padding, class weights"):
                probe.fisher_diagonal()


def test_weights_are_seen_where_the_losses_of_samples_are_nearly_alike() -> None:
    """As those of a model that is not trained yet."""

    def forward(m: Net, x: Tensor, t: Tensor) -> Tensor:
        logits = m.a(x).float()  # as many models do
        return F.cross_entropy(2e-3 * logits, t, weight=WEIGHTS.to(logits))

    model = Net(forward, a=nn.Linear(4, 3))
    for _ in range(4):
        with CurvatureProbe(model, reduction="mean") as probe:
            model(*batch()).backward()
            with pytest.raises(AttributionError, match="class weights"):
                probe.fisher_diagonal()


def several(m: Net, x: Tensor, t: Tensor, reduction: str) -> dict[str, Tensor]:
    """A loss, a balance that couples samples, a sum over samples, and a number that is none of their losses."""
    logits = m.a(x)
    share = logits.softmax(-1).mean(0)
    return {
        "logits": logits,
        "loss": F.cross_entropy(logits, t, reduction=reduction),
        "balance": share @ share,
        "total": logits.square().sum(),
        "scale": m.norm.weight.square().sum(),
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "exact"),
    [
        (lambda out: out["loss"], True),
        (lambda out: out["loss"] + 0.1 * out["total"] / 12, True),
        (lambda out: out["loss"] + 0.1 * out["balance"].detach() * out["loss"], True),
        (lambda out: out["loss"] + 0.0 * out["balance"], True),
        (lambda out: out["loss"] + 0.1 * out["balance"], False),
        (lambda out: out["balance"], False),
    ],
    ids=["loss", "a sum that is divided", "detached", "switched off", "balance", "alone"],
)
def test_of_several_it_matters_which_the_loss_uses(loss: Callable[[Any], Tensor], exact: bool, reduction: str) -> None:
    model = Net(several, a=nn.Linear(4, 3), norm=nn.LayerNorm(3))
    with CurvatureProbe(model, reduction=reduction) as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            loss(model(*batch(), reduction)).backward()
        if exact:
            assert probe.fisher_diagonal()
        else:
            with pytest.raises(AttributionError, match="statistic of the batch"):
                probe.fisher_diagonal()


def test_a_temperature_that_is_returned_is_no_loss() -> None:
    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.a(x), m.norm.weight[0].exp()

    model = Net(forward, a=nn.Linear(4, 3), norm=nn.LayerNorm(3))
    with CurvatureProbe(model, reduction="sum") as probe:
        x, t = batch()
        logits, scale = model(x)
        F.cross_entropy(logits * scale, t, reduction="sum").backward()
        assert probe.fisher_diagonal()
