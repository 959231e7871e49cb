"""Losses built at random: every Fisher and the Hessian against brute force, or an error of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secorder import SecorderError, per_layer_fisher_diagonal, per_layer_hessian_diagonal

from ..helpers import seed
from ..reference import hessian_by_element

N, WIDTH = 4, 3


def squared(f: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return (f - y).square()


def hyperbolic(f: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return torch.cosh(f - y)


def entropy(f: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(f, labels, reduction="none")[:, None]


def indefinite(f: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return torch.sin(f * y) * f.roll(1, 1)


def likelihood(f: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    mean, variance = f[:, :1], F.softplus(f[:, 1:2]) + 1e-3
    return (mean - y[:, :1]) ** 2 / variance + variance.log()


EACH = [squared, hyperbolic, entropy, indefinite, likelihood]
REDUCTIONS = ["mean", "sum", "by_weights"]
EXTRAS = ["none", "ignored_output", "used_output", "scalar_output", "penalty"]
WHERE = ["targets", "closure", "none"]


@dataclass
class Built:
    """A loss, and what it is of one sample alone (with what it holds cut, too)."""

    loss_fn: Callable[..., Tensor]
    alone: Callable[[Tensor, int], Tensor]
    targets: Any


def build(each: Any, reduction: str, where: str, masked: bool, scales: list[int], weights: list[int]) -> Built:
    """A loss of these parts."""
    y, labels = torch.randn(N, WIDTH), torch.arange(N) % WIDTH
    scale = 10.0 ** torch.tensor(scales, dtype=torch.float64)
    weight = 10.0 ** torch.tensor(weights, dtype=torch.float64)
    kept = torch.ones(N, dtype=torch.float64)
    if masked:
        kept[1] = 0.25

    def loss(f: Any, y: Tensor, labels: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        f = f[0] if isinstance(f, tuple) else f
        values = each(f * scale, y, labels).mean(1) * weight * kept
        if reduction == "mean":
            return values.mean()
        return values.sum() / (weight.sum() if reduction == "by_weights" else 1.0)

    everything = (y, labels, weight, kept)

    def of_targets(f: Any, t: tuple[Tensor, ...]) -> Tensor:
        return loss(f, *t)

    def of_closure(f: Any, t: tuple[Tensor, ...]) -> Tensor:
        return loss(f, *t, weight, kept)

    def alone(f: Any, n: int) -> Tensor:
        return loss(f, *(t[n : n + 1] for t in everything))

    if where == "closure":
        return Built(of_closure, alone, (y, labels))
    return Built(of_targets, alone, everything)


class Model(nn.Module):
    def __init__(self, extra: str, smooth: bool) -> None:
        super().__init__()
        self.a, self.b, self.side = nn.Linear(2, 4), nn.Linear(4, WIDTH), nn.Linear(2, 2)
        self.extra, self.smooth = extra, smooth

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        f = self.b(torch.tanh(h) if self.smooth else torch.relu(h))
        if self.extra in ("ignored_output", "used_output"):
            return f, self.side(x)
        return (f, self.side(x).square().mean()) if self.extra == "scalar_output" else f


def with_extra(model: nn.Module, extra: str, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss and what the extra output, or a penalty, adds to it."""

    def loss(f: Any, *rest: Any) -> Tensor:
        value = loss_fn(f, *rest)
        if extra == "used_output":
            value = value + f[1].sin().sum(1).mean()
        if extra == "scalar_output":
            value = value + f[1]
        if extra == "penalty":
            value = value + 0.1 * sum(p.square().sum() for p in model.parameters())
        return value

    return loss


def references(
    model: nn.Module, built: Built, x: Tensor, extra: str
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The empirical Fisher and, where the loss goes by the output, the type-2 Fisher: by a loop over samples."""
    parameters = dict(model.named_parameters())
    empirical = {name: torch.zeros_like(p) for name, p in parameters.items()}
    ggn = {name: torch.zeros_like(p) for name, p in parameters.items()}
    alone = with_extra(model, extra, built.alone)
    for n in range(N):
        output = model(x[n : n + 1])
        found = torch.autograd.grad(alone(output, n), list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(parameters, found, strict=True):
            empirical[name] += 0 if g is None else g**2 / N
        tensors = output if isinstance(output, tuple) else (output,)
        flat = torch.cat([t.flatten() for t in tensors])
        sizes = [t.numel() for t in tensors]

        def of_flat(v: Tensor, n: int = n, tensors: Any = tensors, sizes: Any = sizes, output: Any = output) -> Tensor:
            parts = [p.view(t.shape) for p, t in zip(v.split(sizes), tensors, strict=True)]
            return alone(tuple(parts) if isinstance(output, tuple) else parts[0], n)

        hessian = torch.autograd.functional.hessian(of_flat, flat.detach())
        rows = [torch.autograd.grad(v, list(parameters.values()), retain_graph=True, allow_unused=True) for v in flat]
        for index, (name, p) in enumerate(parameters.items()):
            j = torch.stack([torch.zeros(p.numel()) if r[index] is None else r[index].flatten() for r in rows])
            ggn[name] += torch.einsum("ci,cd,di->i", j, hessian, j).view_as(p) / N
    return empirical, None if extra in ("penalty", "scalar_output") else ggn


def close(found: Tensor, expected: Tensor) -> bool:
    """To a tolerance of the largest entry of the parameter."""
    return bool(((found - expected).abs() <= 1e-8 * expected.abs().max().clamp(min=1e-280)).all())


ANY_LOSS = given(
    each=st.sampled_from(EACH),
    reduction=st.sampled_from(REDUCTIONS),
    where=st.sampled_from(WHERE),
    extra=st.sampled_from(EXTRAS),
    masked=st.booleans(),
    smooth=st.booleans(),
    scales=st.lists(st.integers(-3, 1), min_size=WIDTH, max_size=WIDTH),
    weights=st.lists(st.integers(-6, 6), min_size=N, max_size=N),
    start=st.integers(0, 3),
)


def check_loss(
    each: Any,
    reduction: str,
    where: str,
    extra: str,
    masked: bool,
    smooth: bool,
    scales: list[int],
    weights: list[int],
    start: int,
) -> None:
    torch.set_default_dtype(torch.float64)
    seed(start)
    weights = weights if where != "none" else [0] * N
    built, model, x = build(each, reduction, where, masked, scales, weights), Model(extra, smooth), torch.randn(N, 2)
    loss_fn = with_extra(model, extra, built.loss_fn)
    found = per_layer_hessian_diagonal(model, loss_fn, x, built.targets, method="exact").by_parameter()
    expected = hessian_by_element(model, loss_fn, x, built.targets)
    assert all(close(found[name], expected[name]) for name in found)
    empirical, ggn = references(model, built, x, extra)
    for kind, exact in (("empirical", empirical), ("type-2", ggn)):
        try:
            found = per_layer_fisher_diagonal(model, loss_fn, x, built.targets, fisher_type=kind).by_parameter()
        except SecorderError:
            # A loss that holds what belongs to the samples, or what no batch of one has, may be refused; others not.
            if where == "closure" or extra in ("penalty", "scalar_output", "used_output"):
                continue
            raise
        assert exact is not None
        for name in found:
            assert close(found[name], exact[name]), (kind, name)


test_any_loss = settings(max_examples=30, deadline=None)(ANY_LOSS(check_loss))
test_many_losses = pytest.mark.slow(
    settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])(ANY_LOSS(check_loss))
)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_losses_with_extra_outputs_are_not_refused(extra: str, reduction: str) -> None:
    built, model, x = (
        build(squared, reduction, "targets", False, [0] * 3, [0] * N),
        Model(extra, True),
        torch.randn(N, 2),
    )
    loss_fn = with_extra(model, extra, built.loss_fn)
    if reduction == "sum" and extra in ("penalty", "used_output", "scalar_output"):
        return  # a sum and a mean: no loss of samples
    empirical, _ = references(model, built, x, extra)
    found = per_layer_fisher_diagonal(model, loss_fn, x, built.targets).by_parameter()
    assert all(close(found[name], empirical[name]) for name in found)
