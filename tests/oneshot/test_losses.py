"""Losses as users write them: exact against batches of one, or an error that says the way out."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import (
    CouplingError,
    CurvatureProbe,
    InvalidArgumentError,
    NonFiniteError,
    SecorderError,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)

from ..helpers import make, seed, seeded
from ..reference import assert_all_close, fisher_by_sample, ggn_by_sample, hessian_by_element

N = 5


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, values and labels."""
    seed(1)
    return torch.randn(N, 4), torch.randn(N, 3), torch.arange(N) % 3


X, VALUES, LABELS = batch()
X, VALUES = X.double(), VALUES.double()
WEIGHTS = torch.tensor([0.3, 2.0, 1.0, 0.1, 5.0], dtype=torch.float64)
TEACHER = torch.sin(torch.arange(3.0 * N, dtype=torch.float64)).view(N, 3)


PADDED = torch.where(VALUES.abs() > 1, -1.0, (VALUES > 0).double()).index_fill(1, torch.tensor(0), 1)


def ignored(f: Tensor, t: Any) -> Tensor:
    labels, kept = t
    each = F.cross_entropy(f, labels, reduction="none")
    return (each * kept).sum() / kept.sum()


def focal(f: Tensor, t: Tensor) -> Tensor:
    each = F.cross_entropy(f, t, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def tokens(f: Tensor, t: Tensor) -> Tensor:
    """Mean over tokens, padding left out: three outputs are three binary tokens, of which a target of −1 is none."""
    kept = (t >= 0).double()
    return (F.binary_cross_entropy_with_logits(f, t.clamp(min=0), reduction="none") * kept).sum() / kept.sum()


def of_dicts(f: Tensor, t: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([(a - b["y"]).square().sum() for a, b in zip(f, t, strict=True)]).mean()


def ragged(f: Tensor, t: list[Tensor]) -> Tensor:
    return torch.stack([(a.sum() - b.sum()) ** 2 + a[0] * len(b) for a, b in zip(f, t, strict=True)]).sum()


def of_numpy(f: Tensor, t: np.ndarray) -> Tensor:
    return F.mse_loss(f, torch.from_numpy(t))


def of_numbers(f: Tensor, t: list[int]) -> Tensor:
    return F.cross_entropy(f, torch.tensor(t))


def two_losses(f: Tensor, t: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(f, t["y"]) + 3 * F.mse_loss(f, t["v"])


def set_aside(f: Tensor, t: Tensor) -> Tensor:
    f[t == 0, 2] = -9.0
    return F.cross_entropy(f, t)


def hardest(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f, t, reduction="none").topk(min(2, len(f))).values.mean()


#: Losses of samples: the Fisher is that of batches of one.
EXACT: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "weights_in_targets": (lambda f, t: (t[1] * (f - t[0]).square().sum(1)).mean(), (VALUES, WEIGHTS)),
    "weights_over_decades": (
        lambda f, t: (t[1] * (f - t[0]).square().sum(1)).sum(),
        (VALUES, torch.tensor([1e-12, 1.0, 1e-6, 1e8, 1e-3], dtype=torch.float64)),
    ),
    "weighted_mean": (lambda f, t: (t[1] * (f - t[0]).square().sum(1)).sum() / t[1].sum(), (VALUES, WEIGHTS)),
    "mask": (ignored, (LABELS, torch.tensor([1.0, 1.0, 0.5, 1.0, 2.0], dtype=torch.float64))),
    "class_weights": (nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)), LABELS),
    "partial": (partial(F.cross_entropy, label_smoothing=0.1), LABELS),
    "focal": (focal, LABELS),
    "padded_tokens": (tokens, PADDED),
    "list_of_dicts": (of_dicts, [{"y": v} for v in VALUES]),
    "ragged": (ragged, [torch.ones(k + 1, dtype=torch.float64) for k in range(N)]),
    "numpy": (of_numpy, VALUES.numpy()),
    "numbers": (of_numbers, LABELS.tolist()),
    "scales_of_outputs": (lambda f, t: ((f - t).square() * torch.tensor([1e6, 1.0, 1e-12])).mean(), VALUES),
    "moduli": (lambda f, t: (f - t).abs().mean(), VALUES),
    "overwritten": (lambda f, t: f.sub_(t).square_().mean(), VALUES),
    "assigned": (set_aside, LABELS),
    "no_targets": (lambda f, t: f.exp().sum(1).mean(), None),
    "mining": (hardest, LABELS),
    "dict_of_targets": (
        lambda f, t: F.cross_entropy(f, t["y"]) + 3 * F.mse_loss(f, t["v"]),
        {"y": LABELS, "v": VALUES},
    ),
    "control_flow": (lambda f, t: F.mse_loss(f, t) if f.sum() > -1e9 else f.sum(), VALUES),
    "batch_of_scalars": (lambda f, t: F.gaussian_nll_loss(f[:, 0], t[:, 0], f[:, 1].exp()), VALUES),
    "policy_gradient": (lambda f, t: -(f.log_softmax(1)[range(len(f)), t[0]] * t[1]).mean(), (LABELS, WEIGHTS - 1)),
}


@pytest.mark.parametrize("name", EXACT)
def test_losses_of_samples_are_exact(name: str) -> None:
    loss_fn, targets = EXACT[name]
    model = make()
    one_by_one = {p: torch.zeros_like(v) for p, v in model.named_parameters()}
    for n in range(N):
        part = fisher_by_sample(model, loss_fn, X[n : n + 1], cut(targets, n), 1)
        for p, v in part.items():
            one_by_one[p] += v / N
    assert_all_close(per_layer_fisher_diagonal(model, loss_fn, X, targets).by_parameter(), one_by_one)
    hessian = per_layer_hessian_diagonal(model, loss_fn, X, targets, method="exact").by_parameter()
    assert_all_close(hessian, hessian_by_element(model, loss_fn, X, targets))


def cut(targets: Any, n: int) -> Any:
    """The targets of one sample."""
    if isinstance(targets, (list, np.ndarray)):
        return targets[n : n + 1]
    if isinstance(targets, Tensor):
        return targets[n : n + 1] if len(targets) == N else targets
    if isinstance(targets, tuple):
        return tuple(cut(t, n) for t in targets)
    return {k: cut(t, n) for k, t in targets.items()} if isinstance(targets, dict) else targets


@pytest.mark.parametrize("name", ["weights_over_decades", "scales_of_outputs", "batch_of_scalars", "class_weights"])
def test_type_2_is_right_in_every_entry_whatever_the_scales(name: str) -> None:
    loss_fn, targets = EXACT[name]
    model = make()
    exact = {p: torch.zeros_like(v) for p, v in model.named_parameters()}
    for n in range(N):
        for p, v in ggn_by_sample(
            model, lambda f, t, n=n: loss_fn(f, cut(targets, n)), X[n : n + 1], X[n : n + 1]
        ).items():
            exact[p] += v / N
    found = per_layer_fisher_diagonal(model, loss_fn, X, targets, fisher_type="type-2").by_parameter()
    for p, v in found.items():
        torch.testing.assert_close(v, exact[p], rtol=1e-9, atol=0.0)


def weighted(f: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return (w * (f - t).square().sum(1)).mean()


def own_noise(f: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(f + torch.randn_like(f), t)


def scale_of_noise(f: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(f * torch.rand(len(f), 1), t)


class HoldsAsAttribute:
    def __init__(self) -> None:
        self.weights = WEIGHTS

    def __call__(self, f: Tensor, t: Tensor) -> Tensor:
        return (self.weights[: len(f)] * (f - t).square().sum(1)).mean()


def standardised(f: Tensor, t: Tensor) -> Tensor:
    return (f[:, 0] * (t[:, 0] - t[:, 0].mean()) / t[:, 0].std()).mean()


def centred(f: Tensor, t: Tensor) -> Tensor:
    return ((f - f.mean(0).detach() - t) ** 2).mean()


def centred_targets(f: Tensor, t: Tensor) -> Tensor:
    return ((f[:, 0] - (t[:, 0] - t[:, 0].mean())) ** 2).mean()


def sinkhorn(f: Tensor, t: Tensor) -> Tensor:
    codes = f.detach().softmax(0)
    return -((codes / codes.sum(1, keepdim=True)) * f.log_softmax(1)).sum(1).mean()


def contrastive(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f @ f.T, torch.arange(len(f)))


#: What is not a loss of samples: refused, with what to do.
REFUSED: dict[str, tuple[Callable[..., Tensor], Any, type[SecorderError], str]] = {
    "weights_in_a_closure": (
        lambda f, t: (WEIGHTS * (f - t).square().sum(1)).mean(), VALUES, InvalidArgumentError, "pass them in targets",
    ),
    "equal_weights_in_a_closure": (
        lambda f, t: (torch.ones_like(WEIGHTS) * (f - t).square().sum(1)).sum(),
        VALUES,
        InvalidArgumentError,
        "not on 2 of its samples.*pass them in targets",
    ),
    "weights_that_fit_any_batch": (HoldsAsAttribute(), VALUES, InvalidArgumentError, "pass them in targets"),
    "teacher_in_a_closure": (
        lambda f, t: F.kl_div(f.log_softmax(1), TEACHER.softmax(1)), None, InvalidArgumentError, "pass them in targets",
    ),
    "targets_in_a_closure": (
        lambda f, t: F.cross_entropy(f, LABELS), None, InvalidArgumentError, "pass them in targets",
    ),
    "weights_of_samples_in_a_loss_module": (
        nn.BCEWithLogitsLoss(weight=WEIGHTS[:, None]), VALUES.sigmoid(), InvalidArgumentError, "pass them in targets",
    ),
    "weights_of_partial": (partial(weighted, w=WEIGHTS), VALUES, InvalidArgumentError, "pass them in targets"),
    "noise": (own_noise, VALUES, InvalidArgumentError, "random numbers.*pass them in targets"),
    "random_weights": (scale_of_noise, VALUES, InvalidArgumentError, "random numbers"),
    "standard_deviation": (standardised, VALUES, NonFiniteError, "statistics beforehand"),
    "centred_targets_of_one_output": (centred_targets, VALUES, CouplingError, "statistic of the batch"),
    "detached_mean": (centred, VALUES, CouplingError, "statistic of the batch"),
    "detached_codes": (sinkhorn, None, CouplingError, "statistic of the batch"),
    "contrastive": (contrastive, None, CouplingError, "couples the samples"),
}  # fmt: skip


@pytest.mark.parametrize("fisher_type", ["empirical", "type-2", "mc"])
@pytest.mark.parametrize("name", REFUSED)
def test_other_losses_are_refused_with_the_way_out(name: str, fisher_type: Any) -> None:
    loss_fn, targets, error, words = REFUSED[name]
    model = make()
    with pytest.raises(error, match=words):
        per_layer_fisher_diagonal(model, loss_fn, X, targets, fisher_type=fisher_type)
    if "noise" in name or "random" in name:
        return
    found = per_layer_hessian_diagonal(model, loss_fn, X, targets, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, loss_fn, X, targets))


def test_weights_that_only_show_in_second_derivatives() -> None:
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with pytest.raises(InvalidArgumentError, match="pass them in targets"):
        per_layer_fisher_diagonal(model, lambda f, t: (WEIGHTS[:, None] * f**2).sum(), X, None, fisher_type="type-2")


# ---- the network inside of the loss


def small() -> nn.Sequential:
    seed()
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def gradient_penalty(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        z = t.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
        return f.mean() + ((g.norm(dim=1) - 1) ** 2).mean()

    return loss_fn


def consistency(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, t: f.square().mean() + (model(t) - f).square().mean()


def through_parameters(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, t: f.square().mean() + (F.linear(t, model[0].weight).sin()).sum(1).mean()


INSIDE = {f.__name__: f for f in (gradient_penalty, consistency, through_parameters)}


@pytest.mark.parametrize("name", INSIDE)
def test_the_network_inside_of_the_loss(name: str) -> None:
    model = small()
    loss_fn = INSIDE[name](model)
    found = per_layer_fisher_diagonal(model, loss_fn, X, X + 1).by_parameter()
    assert_all_close(found, fisher_by_sample(model, loss_fn, X, X + 1, N))
    found = per_layer_hessian_diagonal(model, loss_fn, X, X + 1, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, loss_fn, X, X + 1))
    with pytest.raises(InvalidArgumentError, match="network is inside"):
        per_layer_fisher_diagonal(model, loss_fn, X, X + 1, fisher_type="type-2")


def test_a_penalty_of_the_weights_goes_with_a_mean() -> None:
    model = make()

    def penalised(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda f, t: F.mse_loss(f, t, reduction=reduction) + model[0].weight.pow(4).sum()

    mean = penalised("mean")
    found = per_layer_fisher_diagonal(model, mean, X, VALUES).by_parameter()
    assert_all_close(found, fisher_by_sample(model, mean, X, VALUES, N))
    with pytest.raises(CouplingError, match="goes with a mean of losses"):
        per_layer_fisher_diagonal(model, penalised("sum"), X, VALUES)
    for kind in ("type-2", "mc"):
        with pytest.raises(InvalidArgumentError, match="leave a penalty of the weights out"):
            per_layer_fisher_diagonal(model, mean, X, VALUES, fisher_type=kind)


@pytest.mark.parametrize("reduction", [torch.mean, torch.sum])
@pytest.mark.parametrize("where", ["targets", "closure", "attribute", "list"])
def test_residuals_of_a_differential_equation(reduction: Any, where: str) -> None:
    model, x = small(), X.clone().requires_grad_()

    def residual(u: Tensor, z: Tensor) -> Tensor:
        return reduction((torch.autograd.grad(u.sum(), z, create_graph=True)[0].sum(1) - u[:, 0]) ** 2)

    class Held:
        held = None

        def __call__(self, u: Tensor, _: Any) -> Tensor:
            return residual(u, self.held)  # type: ignore[arg-type]

    held, box = Held(), [x]
    held.held = x  # type: ignore[assignment]
    losses: dict[str, Any] = {
        "targets": residual, "closure": lambda u, _: residual(u, x), "attribute": held,
        "list": lambda u, _: residual(u, box[0]),
    }  # fmt: skip
    targets = x if where == "targets" else None
    exact = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(N):
        z = X[n : n + 1].clone().requires_grad_()
        gradients = torch.autograd.grad(residual(model(z), z), list(model.parameters()))
        for name, g in zip(exact, gradients, strict=True):
            exact[name] += g**2 / N
    found = per_layer_fisher_diagonal(model, losses[where], x, targets).by_parameter()
    assert_all_close(found, exact)
    found = per_layer_hessian_diagonal(model, losses[where], x, targets, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, losses[where], x, targets))
    assert box[0] is x
    assert held.held is x


def test_a_part_of_the_inputs_in_a_closure_is_refused() -> None:
    model, x = small(), X.clone().requires_grad_()
    t = x[:, :2]
    loss = lambda u, _: (torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :2] * t).sum(1).mean()  # noqa: E731
    with pytest.raises(SecorderError, match="pass them in targets"):
        per_layer_fisher_diagonal(model, loss, x * 1, None)


class Forces(nn.Module):
    """Returns an energy and its derivative by the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        energy = self.net(x)
        return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_itself() -> None:
    model = Forces()
    loss_fn = lambda f, t: F.mse_loss(f[0], t[0]) + F.mse_loss(f[1], t[1])  # noqa: E731
    targets = (VALUES[:, :1], X.sin())
    exact = fisher_by_sample(model, loss_fn, X, targets, N)
    assert_all_close(per_layer_fisher_diagonal(model, loss_fn, X, targets).by_parameter(), exact)
    found = per_layer_hessian_diagonal(model, loss_fn, X, targets, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, loss_fn, X, targets))


def test_a_loss_that_reads_what_a_hook_of_the_model_wrote() -> None:
    held: dict[str, Tensor] = {}
    model = make()
    model[1].register_forward_hook(lambda module, args, output: held.__setitem__("features", output))
    loss_fn = lambda f, t: F.mse_loss(f, t) + held["features"].square().sum(1).mean()  # noqa: E731
    assert_all_close(
        per_layer_fisher_diagonal(model, loss_fn, X, VALUES).by_parameter(),
        fisher_by_sample(model, loss_fn, X, VALUES, N),
    )
    held.clear()
    found = per_layer_hessian_diagonal(model, loss_fn, X, VALUES, method="exact").by_parameter()
    assert held == {}
    assert_all_close(found, hessian_by_element(model, loss_fn, X, VALUES))


# ---- losses with a state


class Centre(nn.Module):
    """Moves at every call."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))
        self.calls = 0
        self.log: list[Tensor] = []
        self.in_place = in_place

    def forward(self, f: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(f.detach())
        loss = ((f - t - self.centre) ** 2).mean()
        if self.in_place:
            self.centre.mul_(0.5).add_(1.0)
        else:
            self.centre = self.centre * 0.5 + 1.0
        return loss


@dataclass
class Meter:
    total: float = 0.0
    best: Any = None


def stateful_losses() -> dict[str, tuple[Callable[..., Tensor], Callable[[], Any]]]:
    """Losses that have a state, and what it is."""
    module, in_place, by_closure = Centre(), Centre(in_place=True), Centre()
    meter, log, counts, generator = Meter(), [], {"calls": 0}, torch.Generator().manual_seed(3)
    centre, array, draws = torch.zeros(3, dtype=torch.float64), np.zeros(3), random.Random(3)
    number = 0

    def metered(f: Tensor, t: Tensor) -> Tensor:
        loss = F.mse_loss(f, t)
        meter.total += loss.item()
        meter.best = loss.detach()
        log.append(loss.item())
        counts["calls"] += 1
        return loss

    def moving(f: Tensor, t: Tensor) -> Tensor:
        nonlocal number
        number += 1
        loss = F.mse_loss(f - centre, t)
        centre.add_(1.0)
        array[:] += 1
        return loss * number

    def drawn(f: Tensor, t: Tensor) -> Tensor:
        scale = torch.rand((), generator=generator) + draws.random()
        return F.mse_loss(f, t) * scale

    class Bound:
        seen: int = 0

        def loss(self, f: Tensor, t: Tensor) -> Tensor:
            self.seen += 1
            return F.mse_loss(f, t) * self.seen

    bound = Bound()

    def state(m: Centre) -> Any:
        return m.centre.tolist(), m.calls, len(m.log)

    return {
        "module": (module, lambda: state(module)),
        "in_place": (in_place, lambda: state(in_place)),
        "closure": (lambda f, t: by_closure(f, t), lambda: state(by_closure)),
        "partial": (partial(by_closure), lambda: state(by_closure)),
        "meter": (metered, lambda: (meter.total, meter.best, list(log), dict(counts))),
        "moving": (moving, lambda: (number, centre.tolist(), array.tolist())),
        "generators": (drawn, lambda: (generator.get_state().tolist(), draws.getstate())),
        "bound": (bound.loss, lambda: bound.seen),
    }


@pytest.mark.parametrize("name", stateful_losses())
def test_losses_with_a_state_keep_it(name: str) -> None:
    loss_fn, state = stateful_losses()[name]
    model, before = make(), state()
    found = {
        kind: per_layer_fisher_diagonal(model, loss_fn, X, VALUES, fisher_type=kind).by_parameter()
        for kind in ("empirical", "type-2")
    }
    assert state() == before
    hessian = per_layer_hessian_diagonal(model, loss_fn, X, VALUES, method="exact").by_parameter()
    assert state() == before
    with CurvatureProbe(model) as probe:
        probe.hessian_trace(loss_fn, X, VALUES)
        probe.hessian_eigenvalues(loss_fn, X, VALUES, max_iterations=2)
    assert state() == before
    factor = 1.0
    if name == "generators":
        factor = (torch.rand((), generator=torch.Generator().manual_seed(3)) + random.Random(3).random()).item()
    plain = lambda f, t: F.mse_loss(f, t) * factor  # noqa: E731
    assert_all_close(found["empirical"], fisher_by_sample(model, plain, X, VALUES, N))
    assert_all_close(found["type-2"], ggn_by_sample(model, plain, X, VALUES))
    assert_all_close(hessian, hessian_by_element(model, plain, X, VALUES))


def test_a_global_that_is_assigned_is_put_back() -> None:
    space: dict[str, Any] = {"F": F, "count": 0}
    exec("def loss_fn(f, t):\n    global count\n    count += 1\n    return F.mse_loss(f, t) * count", space)
    per_layer_hessian_diagonal(make(), space["loss_fn"], X, VALUES)
    assert space["count"] == 0


def test_what_a_loss_keeps_is_no_tensor_of_vmap() -> None:
    kept: list[Tensor] = []

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        kept.append(f.detach())
        kept[-1].sum().item()
        return F.mse_loss(f, t)

    kept.append(X)
    per_layer_fisher_diagonal(make(), loss_fn, X, VALUES)
    assert len(kept) == 1


def test_state_is_put_back_after_an_exception_in_the_middle() -> None:
    loss_fn, calls = Centre(), []
    model = make(nn.BatchNorm1d(5), nn.Dropout())

    def failing(f: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        torch.rand(3)
        if loss_fn.calls == 0 and len(f) < N:
            raise ZeroDivisionError
        return loss_fn(f, t)

    model.eval()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(SecorderError):
        per_layer_fisher_diagonal(model, failing, X, VALUES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert (loss_fn.calls, loss_fn.log, loss_fn.centre.tolist(), calls) == (0, [], [0.0] * 3, [])
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_draw_is_the_same_whatever_the_chunk() -> None:
    model = make(nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    with CurvatureProbe(model) as probe:

        def draws(size: int | None) -> list[Any]:
            options: dict[str, Any] = {"chunk_size": size, "num_draws": 7, "method": "hutchinson"}
            hessian = probe.hessian_diagonal(F.cross_entropy, X, LABELS, generator=seeded(3), **options)
            trace = probe.hessian_trace(F.cross_entropy, X, LABELS, generator=seeded(3), **options)
            ggn = probe.hessian_trace(F.cross_entropy, X, LABELS, of="ggn", generator=seeded(3), **options)
            mc = probe.fisher_diagonal(
                F.cross_entropy, X, LABELS, fisher_type="mc", num_draws=7, generator=seeded(3), chunk_size=size
            )
            values = [t.value for t in (*trace.values(), *ggn.values())]
            return [*hessian.values(), *mc.values(), torch.tensor(values, dtype=torch.float64)]

        whole = draws(None)
        for size in (1, 2, 3):
            for found, expected in zip(draws(size), whole, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
