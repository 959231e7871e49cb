"""Backward hooks of the user's on modules: what they do to gradients, seen in training's own backward."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe

from ..helpers import data, mlp
from .loops import follow
from .twins import bit_for_bit, traces

MASK = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)

BENT: dict[str, Callable[[Tensor], Tensor]] = {
    "clamped": lambda g: g.clamp(-0.01, 0.01),
    "normalised": lambda g: g / g.norm(),
    "cut down": lambda g: g * (0.05 / g.norm()).clamp(max=1),
}
STRAIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda g: 0.5 * g,
    "reversed": lambda g: -g,
    "masked": lambda g: g * MASK[: g.shape[1]],
    "copied": lambda g: g.clone(),
}


def build(change: Callable[[Tensor], Tensor], before: bool) -> nn.Sequential:
    model = mlp()
    if before:
        model[2].register_full_backward_pre_hook(lambda m, go: (change(go[0]),))
    else:
        model[2].register_full_backward_hook(lambda m, gi, go: (change(gi[0]),))
    return model


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", BENT | STRAIGHT)
def test_hooks_that_change_gradients(change: str, before: bool) -> None:
    model = build((BENT | STRAIGHT)[change], before)
    hooks = traces(model)
    came = follow(model, [data(n) for n in (6, 5, 7, 6)], loss) if change in STRAIGHT else None
    if came is not None:
        assert came.exact
        assert not came.warned
        assert traces(model) == hooks
        return
    with CurvatureProbe(model, reduction="mean") as probe:
        attached = traces(model)
        for n in (6, 5, 7, 6):
            loss(model, data(n)).backward()
            assert traces(model) == attached
        with pytest.raises(AttributionError, match="a backward hook on a module of type Linear"):
            probe.fisher_diagonal()
    assert traces(model) == hooks

    def loop(model: nn.Module) -> Iterator[Any]:
        for n in (6, 5, 7):
            value = loss(model, data(n))
            value.backward()
            yield value

    bit_for_bit(lambda: build(BENT[change], before), loop)


def test_hooks_that_look_on_or_go_in_the_middle() -> None:
    model, seen = mlp(), []
    handle = model[2].register_full_backward_hook(lambda *_: seen.append(1))
    inner = model[1].register_forward_hook(lambda *_: handle.remove())
    came = follow(model, [data(n) for n in (6, 5, 7)], loss)
    assert came.exact
    assert not model[2]._backward_hooks
    inner.remove()


def test_two_probes_and_a_forward_that_fails_leave_the_hooks_as_they_were() -> None:
    model = build(STRAIGHT["scaled"], before=False)
    hooks, (hook,) = traces(model), model[2]._backward_hooks.values()
    inner = nn.Sequential(*model[:3])
    fails = model[4].register_forward_hook(lambda *_: 1 / 0)
    with CurvatureProbe(model), CurvatureProbe(model, reduction="mean") as probe, CurvatureProbe(inner):
        with pytest.raises(ZeroDivisionError):
            model(data()[0])
        fails.remove()
        for _ in range(3):
            loss(model, data()).backward()
        assert list(model[2]._backward_hooks.values()) == [hook]
        assert probe.fisher_diagonal()
    assert traces(model) == hooks


def test_what_is_known_of_hooks_that_are_gone_is_let_go() -> None:
    """Of a hook that is registered anew for each step, as loops that log gradients do."""
    model = mlp()
    with CurvatureProbe(model, reduction="mean") as probe:
        for n in (6, 5, 7, 6):
            handle = model[2].register_full_backward_hook(lambda m, gi, go: (0.5 * gi[0],))
            loss(model, data(n)).backward()
            handle.remove()
        assert len(probe._attachment._factors) == 1
