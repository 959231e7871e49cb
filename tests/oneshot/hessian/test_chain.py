"""Exact Hessians carried along chains: held against brute force, on random chains and where there is no chain."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.oneshot.hessian import chain as chain_module
from secorder.oneshot.hessian.block import Block
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.choice import choose
from secorder.oneshot.hessian.facts import Facts

from ...helpers import Fn, Net
from ...reference import assert_all_close, hessian_by_element

N = 5

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ReLU, nn.Softplus, nn.Identity, lambda: Fn(torch.sin),
    lambda: Fn(lambda x: x * torch.tanh(x)), lambda: Fn(lambda x: x.view(x.shape).clone().square_()),
    lambda: nn.LayerNorm(3, elementwise_affine=False), lambda: nn.Softmax(-1), lambda: nn.Dropout(0.5).eval(),
]  # fmt: skip


class Residual(nn.Module):
    """``x + f(x)``."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def chain(rng: random.Random) -> nn.Sequential:
    """Layers of random depth, width, activation and kind."""
    parts: list[nn.Module] = []
    width = 2
    for _ in range(rng.randint(2, 6)):
        make = rng.choice(ACTIVATIONS)
        following = 3 if make is ACTIVATIONS[10] else rng.randint(1, 5)
        kind = rng.random()
        if kind < 0.15:
            inside = nn.Sequential(nn.Linear(width, 3), make(), nn.Linear(3, width))
            parts.append(Residual(inside))
        elif kind < 0.25:
            parts += [nn.Linear(width, 6), nn.Unflatten(1, (2, 3)), nn.Tanh(), nn.Linear(3, 2), nn.Flatten()]
            width = 4
        else:
            layer = nn.Linear(width, following, bias=rng.random() < 0.8)
            layer.requires_grad_(rng.random() < 0.8)  # frozen ones are measured as well
            parts += [layer, make()]
            width = following
    return nn.Sequential(*parts, nn.Linear(width, 3))


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that is not quadratic, each sample's weight its own."""
    return ((outputs - targets).pow(4).sum(1) * torch.arange(1.0, len(outputs) + 1)).mean()


LOSSES: list[tuple[Any, Callable[[], Tensor]]] = [
    (F.cross_entropy, lambda: torch.randint(3, (N,))),
    (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), lambda: torch.randint(3, (N,))),
    (F.mse_loss, lambda: torch.randn(N, 3)),
    (weighted, lambda: torch.randn(N, 3)),
    (lambda f, t: (f[:, 0] * f[:, 1] + f[:, 2].exp() * t).sum(), lambda: torch.randn(N)),
    (lambda f, t: f.mean(), lambda: torch.randn(N)),
]


def held(model: nn.Module, loss_fn: Any, x: Tensor, t: Any, **options: Any) -> dict[str, str]:
    """The strategies, after the numbers were held against brute force."""
    with CurvatureProbe(model, "all") as probe:
        found = probe.hessian_diagonal(loss_fn, x, t, method="exact", **options)
    assert_all_close(found.by_parameter(), hessian_by_element(model, loss_fn, x, t))
    return {name: str(info.strategy) for name, info in found.info.items()}


@pytest.mark.parametrize("seed", range(40))
def test_random_chains(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = chain(rng)
    loss_fn, targets = rng.choice(LOSSES)
    held(model, loss_fn, torch.randn(N, 2), targets())


def mlp(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize("widths", [(4,) * 3, (4,) * 4, (4,) * 6, (2, 7, 5, 3), (6, 2, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, weighted, lambda f, t: -F.cross_entropy(f, t)], ids=range(3))
def test_chains_that_are_carried_as_factors_and_as_matrices(widths: tuple[int, ...], loss_fn: Any) -> None:
    torch.manual_seed(0)
    t = torch.randn(N, 3) if loss_fn is weighted else torch.randint(3, (N,))
    assert set(held(mlp(2, *widths, 3), loss_fn, torch.randn(N, 2), t).values()) == {"chain"}


@pytest.fixture
def dear_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of segments are worth their while, however small they are."""
    monkeypatch.setattr(chain_module, "_SLOWER", 0)
    monkeypatch.setattr(chain_module, "_MOVED", 0)


@pytest.mark.usefixtures("dear_products")
def test_what_is_a_chain_is_carried_also_by_a_forward_of_ones_own() -> None:
    torch.manual_seed(0)
    x, t = torch.randn(N, 2), torch.randint(3, (N,))
    for model in (
        mlp(2, 4, 3, 4, 3),
        Net(lambda m, x: m.c(torch.sin(m.b(torch.tanh(m.a(x))))), **parts()),
        Net(
            lambda m, x: m.c((lambda h: h + m.b(h.tanh()))(m.a(x)).sigmoid()),
            a=nn.Linear(2, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3),
        ),
    ):  # fmt: skip
        assert set(held(model, F.cross_entropy, x, t).values()) == {"chain"}
        assert set(held(model, F.cross_entropy, x, t, chunk_size=1).values()) == {"chain"}


def test_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("secorder.oneshot.hessian.chain._CACHED_BYTES", 600)
    assert set(held(mlp(2, 4, 5, 4, 3), F.cross_entropy, torch.randn(N, 2), torch.randint(3, (N,))).values()) == {
        "chain"
    }


def test_what_is_made_for_all_samples_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()

    def seconds(work: Callable[[], Any]) -> float:  # the loss's Hessian in the outputs
        work()
        return 1.0

    monkeypatch.setattr("secorder.oneshot.hessian.chain._CACHED_BYTES", 1)
    monkeypatch.setattr("secorder.oneshot.hessian.chain.seconds_of", seconds)
    monkeypatch.setattr("secorder.oneshot.hessian.chain.now", lambda: 0.01 * next(ticks))  # one sample, to each layer
    with CurvatureProbe(mlp(2, 4, 5, 4, 3)) as probe:
        cost = probe.estimate_cost(F.cross_entropy, torch.randn(N, 2), torch.randint(3, (N,)), method="exact")
    assert {c.strategy for c in cost.values()} == {"chain"}
    assert sorted(c.seconds for c in cost.values()) == pytest.approx([0.01 * N] * 3 + [1.0 + 0.01 * N])


@pytest.mark.usefixtures("dear_products")
def test_what_the_products_of_a_segment_take_is_told_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    products: Any = chain_module._products
    made: list[range] = []

    def counted(*args: Any) -> Tensor:
        made.append(args[6])
        return products(*args)

    monkeypatch.setattr(chain_module, "_PRODUCT_BYTES", 1)  # one at a time
    monkeypatch.setattr(chain_module, "_products", counted)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3))
    batch = F.cross_entropy, torch.randn(N, 1, 4, 4), torch.randint(3, (N,))
    with CurvatureProbe(model) as probe:
        cost = probe.estimate_cost(*batch, method="exact")
        few = len(made)
        made.clear()
        assert {i.strategy for i in probe.hessian_diagonal(*batch, method="exact").info.values()} == {"chain"}
    assert {c.strategy for c in cost.values()} == {"chain"}
    assert 0 < few < len(made)
    assert max(ids.stop for ids in made) == 8  # elements of the first layer's z


def clamped(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return x


class Doubled(torch.autograd.Function):
    """Whose gradient is not its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g**3


def parts() -> dict[str, nn.Module]:
    return {"a": nn.Linear(2, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)}


#: Models of parts a, b and c that are no chains, or not as far as to all layers.
NO_CHAINS: dict[str, Callable[[Any, Tensor], Any]] = {
    "coupled": lambda m, x: m.c(torch.tanh(F.batch_norm(m.b(torch.tanh(m.a(x))), None, None, training=True))),
    "mixed samples": lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))).roll(1, 0))),
    "twice": lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.b(torch.tanh(m.a(x))))))),
    "used elsewhere": lambda m, x: (m.c(torch.tanh(m.b(torch.tanh(m.a(x))))), m.a(x)),
    "several outputs": lambda m, x: (lambda h: (m.b(h), m.c(h)))(torch.tanh(m.a(x))),
    "parameter outside": lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))) * m.a.weight.sum(),
    "hook": lambda m, x: m.c(clamped(torch.tanh(m.b(clamped(torch.tanh(m.a(x))))))),
    "custom function": lambda m, x: m.c(Doubled.apply(torch.tanh(m.b(torch.tanh(m.a(x)))))),
    "in place": lambda m, x: m.c(m.b(m.a(x).sigmoid_()).mul_(2).tanh_()),
    "in place on a part": lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))).index_fill_(1, torch.tensor([0]), 0.5))),
    "over samples": lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))) * m.a(x).mean(0))),
    "detached": lambda m, x: m.c((lambda h: h * h.detach().mean(0))(torch.tanh(m.b(torch.tanh(m.a(x)))))),
    "parallel": lambda m, x: m.c(torch.tanh(m.a(x))) + torch.tanh(m.b(torch.tanh(m.a(x)))),
    "gated": lambda m, x: (lambda h: m.c(m.b(h).sigmoid() * h))(torch.tanh(m.a(x))),
}


def any_loss(f: Tensor | tuple[Tensor, ...], t: Tensor) -> Tensor:
    outputs = f if isinstance(f, tuple) else (f,)
    return torch.stack([F.cross_entropy(o, t) for o in outputs]).sum()


@pytest.mark.parametrize("name", NO_CHAINS)
def test_where_there_is_no_chain_the_numbers_are_right(name: str) -> None:
    torch.manual_seed(0)
    model = Net(NO_CHAINS[name], **parts())
    strategies = held(model, any_loss, torch.randn(N, 2), torch.randint(3, (N,)))
    if name in ("coupled", "mixed samples", "used elsewhere", "several outputs", "hook", "custom function"):
        assert strategies["a"] != "chain"


def test_penalties_and_losses_that_couple() -> None:
    torch.manual_seed(0)
    model, x, t = mlp(2, 3, 3, 3), torch.randn(N, 2), torch.randint(3, (N,))
    held(model, lambda f, t: F.cross_entropy(f, t) + model[0].weight.pow(4).sum(), x, t)
    held(model, lambda f, t: F.cross_entropy(f - f.mean(0), t), x, t)
    held(model, lambda f, t: (f @ f.t()).logsumexp(1).mean(), x, t)


@pytest.mark.usefixtures("dear_products")
def test_what_fails_on_the_way_goes_by_other_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Tensor:
        return torch.ones(2) @ torch.ones(3)  # an error of an operator's

    torch.manual_seed(0)
    monkeypatch.setattr("secorder.oneshot.hessian.chain.batched_gradients", fails)
    model = Net(lambda m, x: m.c((lambda h: h + m.b(h.tanh()))(torch.tanh(m.a(x)))), **parts())
    strategies = held(model, F.cross_entropy, torch.randn(N, 2), torch.randint(3, (N,)))
    assert "chain" not in strategies.values()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()], ids=["known to be piecewise linear", "smooth"])
def test_what_fails_on_a_chain_known_by_its_structure_does_so_too(
    activation: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Tensor:
        return torch.ones(2) @ torch.ones(3)  # an error of an operator's, such as of memory that is not there

    torch.manual_seed(0)
    monkeypatch.setattr(Block, "before_matrix", fails)
    model = nn.Sequential(nn.Linear(2, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 3))
    strategies = held(model, F.cross_entropy, torch.randn(N, 2), torch.randint(3, (N,)))
    assert "chain" not in strategies.values()


def test_a_head_on_a_frozen_backbone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
    x, t = torch.randn(N, 1, 3, 3), torch.randint(3, (N,))
    with CurvatureProbe(model, layers=["3", "5"]) as probe:
        found = probe.hessian_diagonal(F.cross_entropy, x, t, method="exact")
    expected = hessian_by_element(model, F.cross_entropy, x, t)
    assert_all_close(found.by_parameter(), {name: expected[name] for name in found.by_parameter()})
    assert {str(info.strategy) for info in found.info.values()} == {"chain"}


def test_traces_go_by_it_too() -> None:
    torch.manual_seed(0)
    model, x, t = mlp(2, 4, 4, 3), torch.randn(N, 2), torch.randint(3, (N,))
    with CurvatureProbe(model) as probe:
        traces = probe.hessian_trace(F.cross_entropy, x, t, method="exact")
        diagonals = probe.hessian_diagonal(F.cross_entropy, x, t, method="exact")
    for name, trace in traces.items():
        assert trace.value == pytest.approx(diagonals[name].sum().item(), rel=1e-9)


def test_it_is_chosen_where_it_is_cheaper() -> None:
    def facts(depth: int, **more: Any) -> Facts:
        known = {"own_use": True, "outputs": 10, "samples_independent": True, "chain_depth": depth, "basis_work": 50}
        return Facts(str(depth), 100, **{**known, **more})

    cheap, dear = facts(1, chain_work=10), facts(2, chain_work=1000)
    exact = Budget("exact")
    assert choose([dear, cheap], exact)["1"].strategy == "chain"
    assert choose([dear, cheap], exact)["2"].strategy == "output-basis"
    assert choose([dear, cheap, facts(3, chain_work=1, basis_work=5000)], exact)["2"].strategy == "chain"
    assert choose([cheap], Budget("hutchinson"))["1"].strategy == "output-draws"
    assert choose([facts(1, chain_work=10, chain_products=7)], Budget("auto", max_hvps=5))["1"].strategy != "chain"
