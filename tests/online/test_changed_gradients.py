"""Backward hooks of the user's on modules: what they do to gradients, seen in training's own backward."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe
from secorder._torch.graph import tells_recomputation

from ..helpers import Net, data, mlp
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


@pytest.mark.parametrize(
    ("change", "straight"),
    [
        (Tensor.clone, True),
        (lambda g: 2 * g, True),
        (lambda g: torch.complex(g.real, g.imag.clamp(-0.01, 0.01)), False),
    ],
    ids=["copied", "scaled", "clamped"],
)
def test_hooks_that_change_complex_gradients(change: Callable[[Tensor], Tensor], straight: bool) -> None:
    model = Net(lambda m, x: m.b(m.turn(m.a(x)).abs()), a=nn.Linear(4, 5), b=nn.Linear(5, 3), turn=Turn())
    model.get_submodule("turn").register_full_backward_pre_hook(lambda _, given: (change(given[0]),))
    came = follow(model, [data(n) for n in (6, 5, 7, 6)], loss)
    assert came.exact if straight else came.refused
    assert straight is not came.warned


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)


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
        assert len([place for place in probe._attachment.factors if place[0] == id(model[2])]) == 1


class Features(nn.Module):
    """Returns logits, and the features that they are computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        return self.b(h), h


def hooked(z: Tensor, change: str) -> Tensor:
    z.register_hook((BENT | STRAIGHT)[change])
    return z


def on_the_model(model: nn.Module, change: str) -> Callable[[Any, Any], Tensor]:
    model.register_full_backward_pre_hook(lambda m, go: ((BENT | STRAIGHT)[change](go[0]), go[1]))
    return lambda m, batch: F.cross_entropy(m(batch[0])[0], batch[1])


def on_a_wrapper(model: nn.Module, change: str) -> Callable[[Any, Any], Tensor]:
    wrapper = nn.Sequential(model)
    wrapper.register_full_backward_pre_hook(lambda m, go: ((BENT | STRAIGHT)[change](go[0]), go[1]))
    return lambda _, batch: F.cross_entropy(wrapper(batch[0])[0], batch[1])


def on_the_output(model: nn.Module, change: str) -> Callable[[Any, Any], Tensor]:
    return lambda m, batch: F.cross_entropy(hooked(m(batch[0])[0], change), batch[1])


def overwritten_later(model: nn.Module, change: str) -> Callable[[Any, Any], Tensor]:
    return lambda m, batch: F.cross_entropy(hooked(m(batch[0])[0], change).mul_(2), batch[1])


def in_the_loss(model: nn.Module, change: str) -> Callable[[Any, Any], Tensor]:
    return lambda m, batch: F.cross_entropy(hooked(m(batch[0])[0] * 2, change), batch[1])


def on_the_features(model: nn.Module, change: str) -> Callable[[Any, Any], Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        z, h = model(batch[0])
        return F.cross_entropy(z, batch[1]) + hooked(h, change).square().mean()

    return loss


PLACES = (
    on_the_model,
    on_a_wrapper,
    on_the_output,
    overwritten_later,
    in_the_loss,
    on_the_features,
)


#: Where PyTorch does not tell what saved tensors are unpacked by, losses are not looked at.
looked_at = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", [*[pytest.param(name, marks=looked_at) for name in BENT], *STRAIGHT])
def test_what_changes_gradients_between_the_model_and_its_loss(
    change: str, place: Callable[[nn.Module, str], Callable[[Any, Any], Tensor]]
) -> None:
    torch.manual_seed(0)
    model = Features().double()
    loss = place(model, change)
    if change in STRAIGHT:
        came = follow(model, [data(n) for n in (6, 5, 7, 6)], loss)
        assert came.exact
        assert not came.warned
        return
    with CurvatureProbe(model, reduction="mean") as probe:
        for n in (6, 5, 7, 6):
            loss(model, data(n)).backward()
        with pytest.raises(AttributionError, match="a backward hook on the model"):
            probe.fisher_diagonal()


@looked_at
@pytest.mark.parametrize("weighs", [lambda g: g * torch.arange(1, len(g) + 1)[:, None], lambda g: g - g.mean(0)])
def test_hooks_that_weigh_or_mix_samples(weighs: Callable[[Tensor], Tensor]) -> None:
    model = mlp()
    with CurvatureProbe(model, reduction="mean") as probe:
        z = model(data()[0])
        z.register_hook(weighs)
        F.cross_entropy(z, data()[1]).backward()
        with pytest.raises(AttributionError, match="a backward hook on the model, its outputs"):
            probe.fisher_diagonal()


class Ramp(torch.autograd.Function):
    """Counts how often its backward runs."""

    times = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factors = [0.5]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Ramp.times += 1
        return g * ctx.factors.pop() / Ramp.times


def test_custom_functions_of_the_loss_run_in_the_users_backward_alone() -> None:
    def loop(model: nn.Module) -> Iterator[Any]:
        Ramp.times = 0
        for n in (6, 5, 7):
            value = F.cross_entropy(Ramp.apply(model(data(n)[0])), data(n)[1])
            value.backward()
            yield value
        assert Ramp.times == 3

    bit_for_bit(mlp, loop)


@pytest.mark.parametrize("first", [{}, {"inputs": "x"}])
def test_a_second_backward_is_not_held_against_the_first(first: dict[str, str]) -> None:
    model, (x, _) = Features().double(), data(6)
    x.requires_grad_()
    with CurvatureProbe(model, reduction="mean") as probe:
        z, h = model(x)
        loss = (z.square().sum(1) + h.square().sum(1)).mean()
        loss.backward(retain_graph=True, **({"inputs": [x]} if first else {}))
        loss.backward()
        assert not any("changes gradients" in reason for reason in probe._fisher.troubles.marks.values())


def test_an_entry_that_gets_no_gradient_in_some_batches_is_no_change() -> None:
    model = mlp()
    model[2].register_full_backward_pre_hook(lambda m, go: (0.5 * go[0],))

    def one_class(model: nn.Module, batch: Any) -> Tensor:
        z: Tensor = model(batch[0])
        z.register_hook(lambda g: 0.5 * g)
        return z[:, batch[1][0]].square().mean()

    came = follow(model, [(data(n)[0], torch.full((n,), n % 3)) for n in (6, 5, 7, 6)], one_class)
    assert came.exact
    assert not came.warned
