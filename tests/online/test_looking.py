"""A forward of another structure than those that were looked at is looked at, too."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning
from secorder.online.reading import unreadable

from ..helpers import Exponential, Net
from .loops import follow


def centred(m: Any, h: Tensor) -> Tensor:
    return m.c(h - h.mean(0))


def centred_instead(m: Any, h: Tensor) -> Tensor:
    """By as many operations as the layer in whose place this is."""
    return h - h.mean(0)


def mixed(m: Any, h: Tensor) -> Tensor:
    return m.c((h + h.roll(1, 0)) / 2)


def attended(m: Any, h: Tensor) -> Tensor:
    return m.c(torch.softmax(h @ h.T, 1) @ h)


def in_another_order(m: Any, h: Tensor) -> Tensor:
    """Samples and positions change places, of which there are as many."""
    return m.c(h[:, :, None].expand(-1, -1, 5).transpose(0, 1)).transpose(0, 1).mean(1)


def twice(m: Any, h: Tensor) -> Tensor:
    return m.c(torch.tanh(m.c(h)))


@pytest.mark.parametrize("at", [3, 5, 6])
@pytest.mark.parametrize(
    ("once", "refused"),
    [
        (centred, {"a", "b", "c"}),
        (centred_instead, {"a", "b", "c"}),
        (mixed, {"a", "b", "c"}),
        (attended, {"a", "b", "c"}),
        (in_another_order, set()),
        (twice, set()),
        (lambda m, h: h, set()),
    ],
)
def test_a_forward_of_another_structure_is_looked_at(once: Any, refused: set[str], at: int) -> None:
    """Of a batch between two looks, alone."""

    def forward(m: Any, x: Tensor, now: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.b(once(m, h) if bool(now[0]) else m.c(h))

    model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3), c=nn.Linear(5, 5))
    batches = [(torch.randn(5, 4), torch.randint(3, (5,)), torch.full((5,), number == at - 1)) for number in range(9)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        came = follow(model, batches, lambda m, b: nn.functional.cross_entropy(m(b[0], b[2]), b[1]))
    assert came.refused.keys() == refused


class Scaled(nn.Module):
    """A factor that is seen by its operation; or a function of the user's own of it, so that the module runs again."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.factor, self.function = nn.Parameter(torch.randn(4)), function

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * (self.function(self.factor) if self.function else self.factor)
        return scaled


@pytest.mark.parametrize("kind", [lambda: nn.LayerNorm(4), Scaled, lambda: Scaled(Exponential.apply)])
def test_a_forward_of_as_many_operations_that_gives_a_layer_its_rows_in_another_order(kind: Any) -> None:
    def forward(m: Any, x: Tensor, now: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        h = h.transpose(0, 1) if bool(now.any()) else h * 2
        h = m.part(h)
        return m.b(h.transpose(0, 1) if bool(now.any()) else h * 2).mean(1)

    model = Net(forward, a=nn.Linear(4, 4), part=kind(), b=nn.Linear(4, 3))
    batches = [(torch.randn(5, 5, 4), torch.randint(3, (5,)), torch.full((5,), number == 4)) for number in range(7)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        came = follow(model, batches, lambda m, b: nn.functional.cross_entropy(m(b[0], b[2]), b[1]), layer_types="all")
    assert came.refused.keys() == {"part"}


def test_a_loss_that_the_model_returns_is_looked_at_where_it_ends_otherwise() -> None:
    def forward(m: Any, x: Tensor, t: Tensor, now: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(m.b(torch.tanh(m.a(x)) + x), t, reduction="none")
        return losses.sum() if bool(now[0]) else losses.mean()

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    batches = [(torch.randn(6, 4), torch.randint(3, (6,)), torch.full((6,), number == 4)) for number in range(9)]
    came = follow(model, batches, lambda m, b: m(*b))
    assert came.refused.keys() == {"a", "b"}
    assert all("is the sum" in reason for reason in came.refused.values())


def test_a_branch_that_is_drawn_is_looked_at_as_it_was_drawn() -> None:
    """What the model draws in the look at a batch is what it drew as it ran."""
    mixes: list[bool] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        mixes.append(len(x) > 1 and float(torch.rand(())) < 0.3)
        return m.b(h - h.mean(0) if mixes[-1] else h)

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    probe = CurvatureProbe(model, reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        for _ in range(8):
            before = len(mixes)
            nn.functional.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
            if any(mixes[before:]):
                break
            assert not unreadable(probe._fisher)
    assert not any(mixes) or unreadable(probe._fisher).keys() == {"a", "b"}
    probe.detach()


@pytest.mark.parametrize(
    "turns",
    [
        [0, 0, "nan", 0, -9],  # the look at the third tells nothing
        [0, 0, 1, 0, 2, 3, 4, 0, 5, 6, 7, 8, 9, 10, 11, 0, -9, -9, -9, -9, -9],  # nobody looks at the 17th
    ],
    ids=["not finite", "one of many"],
)
def test_a_structure_that_no_look_has_told_of_is_not_taken_for_known(turns: list[Any]) -> None:
    def forward(m: Any, x: Tensor, turns: int) -> Tensor:
        h = torch.tanh(m.a(x))
        for _ in range(abs(turns)):
            h = torch.tanh(h) if turns > 0 else h - h.mean(0)
        return m.b(h)

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        for number in turns:
            x = torch.randn(6, 4) * (torch.nan if number == "nan" else 1.0)
            z = model(x, -9 if number == "nan" else number)
            nn.functional.cross_entropy(z, torch.randint(3, (6,))).backward()
        assert unreadable(probe._fisher).keys() == {"a", "b"}


def test_a_branch_that_a_buffer_counts_is_looked_at_as_it_was_counted() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.n += 1
        h = torch.tanh(m.a(x))
        return m.b(h - h.mean(0) if m.n % 5 == 0 else h)

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.register_buffer("n", torch.zeros(()))
    with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        for number in range(1, 6):
            assert not unreadable(probe._fisher)
            nn.functional.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
            assert model.n == number
        assert unreadable(probe._fisher).keys() == {"a", "b"}
