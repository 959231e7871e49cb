"""A loss that the model returns, and what it is multiplied by before backward."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning
from secorder._torch.graph import tells_recomputation

from ...helpers import Net, data, mlp, reference
from ...reference import assert_all_close
from ..loops import follow

Pair = tuple[Tensor, Tensor]


def returns_loss(m: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    logits = m.b(torch.tanh(m.a(x)))
    return {"logits": logits, "loss": F.cross_entropy(logits, y), "norm": logits.square().sum(1).mean()}


def model() -> Net:
    return Net(returns_loss, a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def batches() -> list[Pair]:
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(3)]


def train(net: nn.Module, scale: float) -> None:
    for x, y in batches():
        (net(x, y)["loss"] * scale).backward()


@pytest.mark.parametrize("reduction", ["mean", lambda x, y: None], ids=["mean", "a function"])
def test_a_scale_of_which_nothing_is_told_is_refused(reduction: Any) -> None:
    """Gradients of four micro-batches, as many public loops accumulate them."""
    net = model()
    with CurvatureProbe(net, reduction=reduction) as probe:
        with pytest.warns(UserWarning, match='multiplied by 1/4 .*pass loss_scale="returned"'):
            train(net, 1 / 4)
        with pytest.raises(AttributionError, match="or loss_scale=1 where it is"):
            probe.fisher_diagonal()


@pytest.mark.parametrize(("told", "of"), [("returned", 1.0), (1 / 4, 1.0), (1.0, 1 / 4)])
def test_what_is_told_is_taken(told: Any, of: float) -> None:
    """The first two divide it out; with one, it is a part of the loss."""
    net, found = model(), []
    for scale, options in ((1 / 4, {"loss_scale": told}), (of, {"loss_scale": 1.0})):
        torch.manual_seed(1)
        with CurvatureProbe(net, reduction="mean", **options) as probe:
            train(net, scale)
            found.append(probe.fisher_diagonal())
    assert_all_close(*found)


def alike(x: Tensor, _: Tensor) -> Tensor:
    """Weights of a mean."""
    return torch.full((len(x),), 1 / len(x))


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
@pytest.mark.parametrize(
    ("reduction", "scale", "says"), [("mean", 1 / 4, "loss_scale=1/4"), (alike, 1.0, "that the model does not return")]
)
@pytest.mark.parametrize("cleared", [True, False])
def test_a_loss_that_the_model_returns_tells_nothing_of_another(
    reduction: Any, scale: float, says: str, cleared: bool
) -> None:
    """Such as one that a trainer takes of the logits; it matters where gradients are added up."""
    net = model()
    with CurvatureProbe(net, reduction=reduction, loss_scale="returned") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        for x, y in batches():
            if cleared:
                net.zero_grad()
            (F.cross_entropy(net(x, y)["logits"], y) * scale).backward()
        if cleared:
            assert probe.fisher_diagonal()
        else:
            with pytest.raises(AttributionError, match=says):
                probe.fisher_diagonal()


@pytest.mark.parametrize(
    "kind", ["two terms", "another output", "more of an output", "a weight of its own", "negative"]
)
def test_a_factor_that_is_no_scale_is_none_of_its_business(kind: str) -> None:
    losses = {
        "two terms": lambda out, y: out["loss"] + 0.1 * out["norm"],
        "more of an output": lambda out, y: 0.5 * out["loss"] + 0.5 * F.nll_loss(out["logits"], y),
        "another output": lambda out, y: F.cross_entropy(out["logits"], y) + 0.1 * out["norm"],
        "a weight of its own": lambda out, y: 1.04 * out["loss"],
        "negative": lambda out, y: -out["loss"],
    }
    assert follow(model(), batches(), lambda m, b: losses[kind](m(*b), b[1])).exact


@pytest.mark.parametrize("reduction", ["mean", alike])
def test_what_an_earlier_loss_was_divided_by_tells_nothing_of_one_that_the_model_returns(reduction: Any) -> None:
    net = model()
    with CurvatureProbe(net, reduction=reduction, loss_scale="returned") as probe:
        for number, (x, y) in enumerate(batches()):
            out = net(x, y)
            loss = out["loss"] if number else F.cross_entropy(out["logits"], y)
            (loss / 4).backward()
            if not number:
                net.zero_grad()
        assert probe.fisher_diagonal()


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
@pytest.mark.parametrize("untold", [None, "returned"])
def test_a_scaler_that_nothing_is_told_of_is_told_of(untold: Any) -> None:
    """A model that returns no loss tells nothing of the scale of one."""
    net, batch = mlp(), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with (
        CurvatureProbe(net, reduction="mean", loss_scale=untold) as probe,
        CurvatureProbe(net, loss_scale=scaler, reduction="mean") as told,
    ):
        with pytest.warns(CurvatureWarning, match="a GradScaler multiplies the loss"):
            scaler.scale(F.cross_entropy(net(batch[0]), batch[1])).backward()
        with pytest.raises(AttributionError, match="pass the scaler as loss_scale="):
            probe.fisher_diagonal()
        assert_all_close(told.fisher_diagonal().by_parameter(), reference(net, batch))
