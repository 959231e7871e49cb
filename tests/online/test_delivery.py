"""What the calls of a layer bring is added once, by whatever way its per-sample gradients are told."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online import closing
from secorder.online.fisher import OnlineFisher
from secorder.online.record import ForwardRecord

from ..helpers import Net, data, reference, step
from ..reference import assert_all_close


class Scale(nn.Module):
    """A parameter without a rule; as a sine of it, it is no operation's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sin(self.weight)


def by_all_ways() -> nn.Module:
    """A rule, operations, and a module that is run again (its forward is hidden by a function of the user's)."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return gradients[0] * w, (gradients[0] * x).sum(0)

    class Custom(Scale):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Hidden.apply(x, self.weight)
            return found

    return nn.Sequential(nn.Linear(4, 5), Scale(), nn.Tanh(), Custom(), nn.Linear(5, 3)).double()


def test_each_way_brings_the_same_numbers_and_keeps_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = by_all_ways(), data()
    closed: list[ForwardRecord] = []
    add = closing._add_record

    def watched(fisher: OnlineFisher, record: ForwardRecord) -> None:
        add(fisher, record)
        closed.append(record)

    monkeypatch.setattr(closing, "_add_record", watched)
    with CurvatureProbe(model, layer_types="all", reduction="mean") as probe:
        for _ in range(2):
            step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    assert len(closed) == 2
    for record in closed:
        assert not any(own.captured or own.modules for own in record.layers.values())
        assert {name for name, own in record.layers.items() if own.received} == set(probe.layer_names)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.0, 1.0, 3.0, 1.0]])
def test_each_way_takes_the_weights_of_samples(weights: list[float]) -> None:
    """L = Σ c_n ℓ_n: what is accumulated is the mean of (∂ℓ_n)² over samples that have a weight."""
    model, (x, y) = by_all_ways(), data()
    c = torch.tensor(weights, dtype=torch.float64) / 10
    with CurvatureProbe(model, layer_types="all", reduction=lambda *_: c) as probe:
        (F.cross_entropy(model(x), y, reduction="none") * c).sum().backward()
        kept = c != 0
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, (x[kept], y[kept])))


def test_a_call_of_one_sample_without_a_dimension_for_it() -> None:
    model = Net(
        lambda m, x: m.b(torch.stack([torch.tanh(m.a(row)) for row in x])), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    )
    x, y = data()
    probe = CurvatureProbe(model, reduction="mean")
    for row in range(2):
        model.zero_grad()
        F.cross_entropy(model(x[row : row + 1]), y[row : row + 1]).backward()
    found = probe.fisher_diagonal(missing="skip").by_parameter()
    expected = reference(model, (x[:2], y[:2]))
    assert_all_close(found, {name: expected[name] for name in found})
