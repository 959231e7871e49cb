"""Gradients that are clamped or normalised on their way are those of no sample, and the layers before say so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CurvatureProbe

from ...helpers import Clamped, Doubled, Fn, Net, data
from ..loops import follow


class Normalised(torch.autograd.Function):
    """Gradients of the length one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / g.norm()


def hooked(hook: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def through(h: Tensor) -> Tensor:
        h = h.tanh()
        if h.requires_grad:
            h.register_hook(hook)
        return h

    return through


BENT = {
    "clamped by a hook": hooked(lambda g: g.clamp(-0.01, 0.01)),
    "normalised by a hook": hooked(lambda g: g / g.norm()),
    "clamped by a function": Clamped.apply,
    "normalised by a function": Normalised.apply,
    "chosen by their mean": hooked(lambda g: g * (g.abs() > g.abs().mean())),
    "chosen among samples": hooked(lambda g: g * (g == g.amax(0))),
    "ranked among samples": hooked(lambda g: g * g.argsort(0)),
}
STRAIGHT = {
    "scaled by a hook": hooked(lambda g: 0.5 * g),
    "masked by its sign": hooked(lambda g: g.clamp(min=0)),
    "scaled by a function": Doubled.apply,
    "looked at by a hook": hooked(lambda g: g.clone()),
}


class Prompted(nn.Module):
    """A parameter of its own before what changes gradients."""

    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prompt, self.through = nn.Parameter(torch.randn(2, 4)), through

    def forward(self, x: Tensor) -> Tensor:
        return self.through(x[:, None] + self.prompt).mean(1)


class Chosen(Prompted):
    """Which rows of the parameter a sample takes depends on its data: the module runs again."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.through(x + self.prompt[(x[:, 0] > 0).long()])


class Recomputed(Prompted):
    """What uses the parameter is hidden by a checkpoint: the module runs again."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


BEFORE: dict[str, Callable[[Callable[[Tensor], Tensor]], nn.Module]] = {
    "layer": lambda through: nn.Sequential(nn.Linear(4, 4), Fn(through)),
    "recurrent layer": lambda through: Net(lambda m, x: through(m.rnn(x[None])[0][0]), rnn=nn.GRU(4, 4)),
    "own parameter": Prompted,
    "rows by data": Chosen,
    "checkpoint": Recomputed,
}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("through", BENT | STRAIGHT)
def test_layers_before_what_changes_gradients(before: str, through: str) -> None:
    model = Net(lambda m, x: m.head(m.body(x)), body=BEFORE[before]((BENT | STRAIGHT)[through]), head=nn.Linear(4, 3))
    came = follow(model, [data(n) for n in (6, 5, 7, 6)], loss, layer_types="all")
    if through in STRAIGHT:
        assert came.exact
        return
    assert came.probe is not None
    assert came.left_out.keys() | came.refused.keys() == set(came.probe.layer_names) - {"head"}
    with pytest.raises(AttributionError, match=r"clamps|hook"):
        came.probe.fisher_diagonal()
    assert came.probe.fisher_diagonal(missing="skip").keys() == {"head"}


def test_a_hook_that_comes_later() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Fn(torch.tanh), nn.Linear(4, 3))
    with CurvatureProbe(model, reduction="mean") as probe:
        for step in range(6):
            model[1].function = torch.tanh if step < 2 else BENT["clamped by a hook"]
            loss(model, data()).backward()
        with pytest.raises(AttributionError, match=r"layer '0'.*clamps"):
            probe.fisher_diagonal()
        assert probe.fisher_diagonal(missing="skip").keys() == {"2"}


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_a_shift_that_a_normalisation_takes_out_has_no_gradient_to_be_in_proportion(kind: torch.dtype) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        output: Tensor = m.head(F.layer_norm(Doubled.apply(m.a(x)) + m.shift(x), (6,)))
        return output

    model = Net(forward, a=nn.Linear(4, 6), shift=nn.Linear(4, 1), head=nn.Linear(6, 3)).to(kind)
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(4):
            x, y = data()
            F.cross_entropy(model(x.to(kind)), y).backward()
        probe.fisher_diagonal()


def test_a_model_in_float64_while_the_default_is_another() -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(4, 4), Fn(Doubled.apply), nn.Linear(4, 3)).double()
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(4):
            x, y = data()
            F.cross_entropy(model(x.double()), y).backward()
        probe.fisher_diagonal()
