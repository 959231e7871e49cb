"""Where samples are in the operations that parameters meet them in."""

from typing import Any

import pytest
import torch
from torch import Tensor

from secorder.layers.layout import Layout
from secorder.online.samples.forward_graph import ForwardGraph
from secorder.online.samples.hypotheses import Hypothesis, Trial
from secorder.online.samples.use_rows import rows_of_uses

from ...helpers import Opaque, run_again_where_nothing_tells

N, T = 4, 3


def places(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A table of places, first multiplied by a matrix: no sample owns its rows."""
    return torch.tanh(x + b @ w.t())


@run_again_where_nothing_tells
@pytest.mark.parametrize("loss", [False, True], ids=["rows", "loss"])
def test_operations_without_samples_are_followed(loss: bool) -> None:
    x, w, b = torch.randn(N, T, 5), torch.randn(5, 2, requires_grad=True), torch.randn(T, 2, requires_grad=True)

    def forward(given: Any) -> Any:
        z = places(given, w, b)
        return z.pow(2).mean() if loss else z

    options = [[]] if loss else [[Layout(0)]]
    graph = ForwardGraph(forward(x), options, N, hooked=False)
    found = rows_of_uses({"": {"w": w, "b": b}}, Trial(forward, x, Hypothesis((0,), N)), graph, {}, routed=False)
    assert not found.unknown
    assert found.reached == {""}
    ((layout, place, shape),) = found.known[""]
    assert (layout, shape) == (Layout(0), (N, T, 5))
    assert "MmBackward0 0 AddBackward0 1" in place
    assert found.routes[""] == {("w", "MmBackward0 1"), ("b", "MmBackward0 0")}


def test_samples_that_mix_have_no_rows() -> None:
    x, w = torch.randn(N, 5), torch.randn(5, requires_grad=True)
    graph = ForwardGraph((x * w).mean(0), [[]], N, hooked=False)
    trial = Trial(lambda x: (x * w).mean(0), x, Hypothesis((0,), N))
    found = rows_of_uses({"": {"w": w}}, trial, graph, {}, routed=False)
    assert found.unknown == {""}


def test_a_use_that_no_gradient_comes_to_is_told_by_another_at_the_same_place() -> None:
    """The first step of a recurrence that is set back at its start, by a mask: zeros would do for samples anywhere."""
    x, w, v = torch.randn(N, T, 5), torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    keep = torch.tensor([0.0, 1.0, 1.0])

    def forward(x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(T):
            h = Opaque.apply(keep[t] * (h * v + w)) + x[:, t]
        return h

    graph = ForwardGraph(forward(x), [[Layout(0)]], N, hooked=False)
    found = rows_of_uses({"": {"w": w}}, Trial(forward, x, Hypothesis((0,), N)), graph, {}, routed=False)
    assert found.blank == found.repeated == {""}
    assert {layout for layout, *_ in found.known[""]} == {Layout(0)}
    keep.zero_()
    graph = ForwardGraph(forward(x), [[Layout(0)]], N, hooked=False)
    found = rows_of_uses({"": {"w": w}}, Trial(forward, x, Hypothesis((0,), N)), graph, {}, routed=False)
    assert found.blank == {""}
    assert not found.repeated
