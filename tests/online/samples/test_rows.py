"""Which rows of a layer's output belong to which sample."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder.layers.layout import Layout
from secorder.layers.selection import select_layers
from secorder.online.samples.search import attribute

from ...helpers import Net, data
from ..loops import follow


@pytest.mark.parametrize("returns_loss", [False, True])
def test_by_cotangents_and_by_change_the_same_rows_are_found(returns_loss: bool) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.first(x)).flatten(0, 1)
        out = m.second(hidden).view(*x.shape[:2], -1).mean(1)
        return F.mse_loss(out, torch.zeros_like(out)) if returns_loss else out

    model = Net(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 3))
    found = attribute(model, select_layers(model), (torch.randn(5, 3, 4),), {}, 0)
    assert {name: calls[0].layout for name, calls in found.known.items()} == {
        "first": Layout(),
        "second": Layout(0, 3, True),
    }


def test_a_call_without_gradient_is_told_by_one_of_the_same_shape() -> None:
    """Such as of queries, (6, N, 4), of which a mask is made first: zeros would do for two rows a sample as well."""

    def forward(m: Net, x: Tensor) -> Tensor:
        queries = m.first(x).repeat(6, 1, 1)
        mask = (m.second(queries) > 0).detach()
        hidden: Tensor = m.second(queries * (1 + mask))
        return hidden.transpose(0, 1)

    model = Net(forward, first=nn.Linear(4, 4), second=nn.LayerNorm(4))
    found = attribute(model, select_layers(model, nn.LayerNorm), (torch.randn(3, 4),), {}, 0)
    assert [(call.place, call.layout) for call in found.known["second"]] == [(0, Layout(1)), (1, Layout(1))]


@pytest.mark.parametrize("width", [4, 8])
def test_rounding_where_gradients_cancel(width: int) -> None:
    """Behind a normalisation of two elements, what comes through is rounded relative to what cancels."""
    model = nn.Sequential(nn.Linear(4, width), nn.GroupNorm(width // 2, width), nn.Tanh(), nn.Linear(width, 3))
    came = follow(model, [data(width) for _ in range(4)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert came.exact
    assert not came.warned


def test_what_is_not_linear_is_no_rounding() -> None:
    """A hook that divides by the norm of the whole batch's gradient couples samples in backward alone."""

    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.first(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda g: g / g.norm())
        return m.second(hidden)

    model = Net(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 3))
    found = attribute(model, select_layers(model), (torch.randn(5, 4),), {}, 0)
    assert "first" not in found.known or {x.name: x for x in found.layers}["first"].enclosing is model
    assert "second" in found.known


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("steps", [5, 6, 12])
def test_of_what_the_model_keeps_for_the_loss_alone_samples_are_where_change_shows_them(
    steps: int, again: bool
) -> None:
    """Positions first, of which there may be as many as samples: no output depends on it, nor tells."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.kept = m.second(x.transpose(0, 1)).square().mean()
        output: Tensor = m.first(x).sum(1)
        return output + m.second(x).sum(1) if again else output

    def loss(m: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1]) + m.kept

    model: Any = Net(forward, first=nn.Linear(4, 3), second=nn.Linear(4, 3))
    found = follow(model, [(torch.randn(6, steps, 4), torch.arange(6) % 3) for _ in range(3)], loss)
    assert found.exact
    assert not found.warned


def test_of_what_is_left_unused_nothing_is_said() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.second(x.transpose(0, 1).mean(1, keepdim=True).expand(-1, 6, -1))
        output: Tensor = m.first(x).sum(1)
        return output

    batches = [(torch.randn(6, 6, 4), torch.arange(6) % 3) for _ in range(3)]
    model = Net(forward, first=nn.Linear(4, 3), second=nn.Linear(4, 3))
    assert not follow(model, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1])).warned


def test_what_a_reentrant_checkpoint_hides_is_not_taken_for_unreached() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        output: Tensor = m.second(checkpoint(m.first, x, use_reentrant=True))
        return output

    model = Net(forward, first=nn.Linear(4, 6), second=nn.Linear(6, 3))
    found = attribute(model, select_layers(model), (torch.randn(6, 6, 4, requires_grad=True),), {}, 0)
    assert found.reached == {"first", "second"}
