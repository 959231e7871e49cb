"""What keeps a layer's number from being told is said once in training, and raised when it is read."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning, ProbeStateError
from secorder.online.troubles import Troubles, sentence

from ..helpers import Net, no_warnings


def test_a_mark_is_warned_of_once_and_keeps_its_first_reason() -> None:
    troubles = Troubles(["a", "b"], strict=False)
    with pytest.warns(CurvatureWarning, match="layer 'a': first"):
        troubles.mark(["a", "unknown"], "first")
    with no_warnings():
        troubles.mark(["a"], "second")
    assert troubles.marks == {"a": "first"}


def test_that_a_batch_is_left_out_is_warned_of_once_a_layer_and_reason() -> None:
    troubles = Troubles(["a", "b", "c"], strict=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for names, reason in (("ab", "first."), *[(name, "first.") for name in "abc"], ("a", "second.")):
            troubles.leave_out(None, list(names), reason)
    assert [str(warning.message) for warning in told] == [
        "layers 'a', 'b': first. This batch is left out of it.",
        "layer 'c': first. This batch is left out of it.",
        "layer 'a': second. This batch is left out of it.",
    ]


def test_a_strict_one_raises_at_once() -> None:
    with pytest.raises(AttributionError, match=r"layers 'a', 'b': why"):
        Troubles(["a", "b"], strict=True).mark(["a", "b"], "why")


def test_what_an_audit_finds_is_raised_at_once_where_the_probe_is_strict() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    with CurvatureProbe(model, reduction="mean", strict=True):
        loss = model(torch.randn(8, 4)).square().sum(1).mean() + sum(p.square().sum() for p in model.parameters())
        with pytest.raises(AttributionError, match="a weight penalty in the loss"):
            loss.backward()


def test_why_nothing_was_accumulated_goes_by_what_was_seen() -> None:
    troubles = Troubles(["a"], strict=False)
    assert "was not called" in troubles.nothing_accumulated(nn.Linear(2, 3), [])
    troubles.saw("no grad")
    assert "torch.no_grad" in troubles.nothing_accumulated(nn.Linear(2, 3), [])
    assert "were trained" not in troubles.nothing_accumulated(nn.Linear(2, 3), [])
    assert "were trained" in troubles.nothing_accumulated(nn.Linear(2, 3), [""])
    troubles.saw("forward")  # of which torch.autograd.grad may have brought them
    assert "were trained" not in troubles.nothing_accumulated(nn.Linear(2, 3), [""])


def test_sentences_name_the_layers() -> None:
    assert sentence(["a"], "why") == "layer 'a': why"
    assert sentence(["a", "b"], "why") == "layers 'a', 'b': why"
    assert sentence([*"abcdefgh"], "why") == "layers 'a', 'b', 'c', 'd', 'e', 'f', … (8 in all): why"


def _functional(model: nn.Module, x: Tensor) -> None:
    loss = lambda values: torch.func.functional_call(model, values, (x,)).mean()  # noqa: E731
    torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})


def _traced(model: nn.Module, x: Tensor) -> None:
    torch.jit.trace(model, x)


@pytest.mark.parametrize(("call", "cause"), [(_functional, "torch.func.grad"), (_traced, "traced or exported")])
def test_a_forward_that_no_backward_of_training_can_reach_is_said(
    call: Callable[[nn.Module, Tensor], None], cause: str
) -> None:
    model = nn.Linear(4, 3)
    with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        call(model, torch.randn(5, 4))
        with pytest.raises(ProbeStateError, match=cause):
            probe.fisher_diagonal()


def gradient_penalty(model: Any, x: Tensor) -> None:
    """In one backward with another forward, of which nothing need be said then."""
    points = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    (model(x).mean() + (slope.norm(dim=1) - 1).square().mean()).backward()


def two_losses(model: Any, x: Tensor) -> None:
    output = model(x)
    output.mean().backward(retain_graph=True)
    output.square().mean().backward()


def another_method(model: Any, x: Tensor) -> None:
    (model(x).mean() + model.b(x).square().mean()).backward()


def weight_penalty(model: Any, x: Tensor) -> None:
    (model(x).mean() + model.a.weight.square().sum()).backward()


@pytest.mark.parametrize(
    ("train", "layer", "cause", "advice"),
    [
        (gradient_penalty, "a", "a derivative of the model's output", "let the model itself return"),
        (two_losses, "a", "another loss in a second backward", "call backward once"),
        (another_method, "b", "a method such as get_value", "attach to the module that is called"),
        (weight_penalty, "a", "", 'pass penalty="shared"'),
    ],
)
def test_where_gradient_from_outside_comes_from_is_said(
    train: Callable[[Any, Tensor], None], layer: str, cause: str, advice: str
) -> None:
    model = Net(lambda m, x: torch.tanh(m.a(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        for _ in range(2):
            train(model, torch.randn(5, 4))
        with pytest.raises(AttributionError, match=f"'{layer}'.*{cause and f'most likely {cause}'}.*{advice}"):
            probe.fisher_diagonal()
