"""Layers whose output is the model's: exact without a column, and only where that is so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.layers.rules.registry import RULES, Entry

from ..helpers import Mixed, rule_of_mixed
from ..reference import assert_all_close, hessian_by_element

N, T = 4, 3
TARGETS = torch.arange(N) % 3
TOKENS = torch.arange(N * T).view(N, T) % 5
SIGNS = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)


class Transposed(nn.Module):
    """A head whose output is turned, in a model whose outputs have as many positions as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).transpose(0, 1).transpose(0, 1).flip(1)


class Turned(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Last(nn.Module):
    """Logits as ``cross_entropy`` takes them, of tokens in the last dimension."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).tanh()).transpose(1, 2)


class Two(nn.Module):
    """Two heads on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.other = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.head(h), self.other(h)


def by_tokens(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f.flatten(0, 1), t.flatten())


def signed(f: Tensor, t: Tensor) -> Tensor:
    return (t[1] * F.cross_entropy(f, t[0], reduction="none")).mean()


Case = tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Any, Any], Tensor], Any, set[str]]
CASES: dict[str, Case] = {
    "classes": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
        F.cross_entropy,
        TARGETS,
        {"2"},
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)), (T, 4), by_tokens, TOKENS, {"2"}),
    "tokens last": (lambda: Last(5), (T, 4), F.cross_entropy, TOKENS, {"head"}),
    "as many tokens as words": (lambda: Last(T), (T, 4), F.cross_entropy, TOKENS % T, {"head"}),
    "channels last": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), Turned(0, 2, 3, 1)),
        (2, 3, 4),
        lambda f, t: F.cross_entropy(f.flatten(0, 2), t.view(-1, 1, 1).expand(-1, 2, 3).flatten()),
        TARGETS,
        {"0"},
    ),
    "negative weights": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,), signed, (TARGETS, SIGNS), {"0"}),
    "pixels": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 6, 1, groups=2)),
        (2, 3, 3),
        lambda f, t: F.cross_entropy(f, t.view(-1, 1, 1).expand(-1, 2, 2)),
        TARGETS,
        {"2"},
    ),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1)),
        (2, 3, 3),
        lambda f, t: F.mse_loss(f, t.to(f)),
        torch.ones(N, 2, 3, 3),
        {"0"},
    ),
    "positions that interact": (
        lambda: nn.Sequential(nn.Linear(4, 5)),
        (T, 4),
        lambda f, t: F.cross_entropy(f.sum(1), t),
        TARGETS,
        set(),
    ),
    "a softmax over positions": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False)),
        (T, 4),
        lambda f, t: F.cross_entropy(f, TOKENS[:, :1].expand(-1, 5) % T),
        None,
        set(),
    ),
    "not the last": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()), (4,), F.cross_entropy, TARGETS, set()),
    "turned": (Transposed, (4,), F.cross_entropy, TARGETS, set()),
    "two": (Two, (4,), lambda f, t: F.cross_entropy(f[0], t) + f[1].square().sum(1).mean(), TARGETS, {"head", "other"}),
}

#: Of these, few as the outputs are, the Hessian may be carried back through what turns them.
TURNED = ("tokens last", "as many tokens as words", "channels last")


@pytest.mark.parametrize("name", CASES)
def test_heads_need_no_columns(name: str) -> None:
    make, shape, loss_fn, targets, heads = CASES[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(N, *shape)
    with CurvatureProbe(model, "all") as probe:
        facts = probe.hessian_facts(loss_fn, x, targets)
        assert {layer for layer, f in facts.items() if f.last} == heads
        hessian = probe.hessian_diagonal(loss_fn, x, targets, method="exact")
        by_columns = [layer for layer in heads if hessian.info[layer].strategy != "chain" or name not in TURNED]
        assert all(hessian.info[layer].num_hvps <= 5 for layer in by_columns)
        assert_all_close(hessian.by_parameter(), hessian_by_element(model, loss_fn, x, targets))
        if name in ("negative weights", "a softmax over positions"):
            return
        ggn = probe.fisher_diagonal(loss_fn, x, targets, fisher_type="type-2")
    last = {layer for layer in ggn if layer in heads or len(ggn) == 1}
    if name not in ("not the last",):  # of a last layer, the Hessian of a mean is the GGN
        assert_all_close({k: ggn[k] for k in last}, dict(hessian))


def test_a_head_whose_rule_mixes_cotangents_takes_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, Mixed, Entry(rule_of_mixed, None, False))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Mixed()), torch.randn(N, 4)
    with CurvatureProbe(model, "all") as probe:
        assert not probe.hessian_facts(F.cross_entropy, x, TARGETS % 2)["2"].last
        fisher = probe.fisher_diagonal(F.cross_entropy, x, TARGETS % 2, fisher_type="type-2")
    assert_all_close(fisher.by_parameter(), hessian_by_element(model, F.cross_entropy, x, TARGETS % 2))
