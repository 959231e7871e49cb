"""nn.LSTM as one operation."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder._torch.graph import users_of
from secorder.layers.layout import Layout
from secorder.layers.operations import OPERATIONS, TOGETHER, OperationCall, recurrent
from secorder.layers.operations.recurrent import lstm
from secorder.layers.per_sample import dense

N, T = 3, 5


def run(layer: nn.Module, x: Tensor, state: Any, ends: str) -> Tensor:
    """A number of what is named: the outputs o, the last state h, the last cell c."""
    out, (h, c) = layer(x, state)
    found = [(out * out.detach().sin()).sum(), (h * 2).sum(), (c * c).sum()]
    return sum(f for f, name in zip(found, "ohc", strict=True) if name in ends)


@pytest.mark.parametrize("ends", ["o", "h", "c", "ohc"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True}], ids=str)
def test_lstm(ends: str, options: dict[str, Any]) -> None:
    compare(nn.LSTM(4, 2, **options).float(), ends)


def test_gates_that_are_closed() -> None:
    layer = nn.LSTM(4, 2).float()
    with torch.no_grad():
        layer.bias_ih_l0.copy_(torch.tensor([200, 0, 0, -200, 0, 200, -200, 0]))  # the first output is exactly zero
    compare(layer, "ohc")


def compare(layer: nn.LSTM, ends: str) -> None:
    """Hold what the rule brings against each sample's own gradient in float64."""
    directions = 1 + layer.bidirectional
    x, state = torch.randn(T, N, 4).float(), [torch.randn(directions, N, 2).float() for _ in range(2)]
    nodes: list[Any] = []
    z = run(layer, x, tuple(state), ends)
    nodes = [node for node in users_of([z]) if node.name() == "MkldnnRnnLayerBackward0"]
    if not nodes:
        pytest.skip("this PyTorch runs nn.LSTM in many operations")
    found: dict[int, list[Tensor]] = {}

    def hook(node: Any, gradients: tuple[Tensor | None, ...]) -> None:
        for _ in range(2):  # where gates are kept is learnt with the first call
            call = OperationCall(node, gradients, [Layout(1), Layout(0), Layout(0)], N, torch.float32)
            for index in (1, 2, 3, 4):
                before, _ = node.next_functions[index]
                if before is not None:
                    part = lstm(call, index)
                    assert part is not None
                    found.setdefault(id(before.variable), []).append(dense(part, before.variable.numel()))

    for node in nodes:
        node.register_prehook(lambda gradients, node=node: hook(node, gradients))
    z.backward()
    exact = copy.deepcopy(layer).double()
    for n in range(N):
        exact.zero_grad()
        run(exact, x[:, n : n + 1].double(), tuple(s[:, n : n + 1].double() for s in state), ends).backward()
        for p, q in zip(layer.parameters(), exact.parameters(), strict=True):
            expected = torch.zeros_like(q) if q.grad is None else q.grad
            if id(p) in found:
                for one in found[id(p)]:
                    torch.testing.assert_close(one[n].double(), expected.flatten(), rtol=2e-5, atol=2e-6)
            else:
                assert not expected.any()


@pytest.mark.parametrize("kept", [None, torch.ones(T, N, 4, 2)])
def test_gates_that_are_not_where_they_are_looked_for(kept: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "kept_gates", lambda *_: kept)
    monkeypatch.setattr(recurrent, "_kept", {})
    test_lstm("ohc", {})
    assert not any(recurrent._kept.values())


def test_other_inputs_and_other_layouts_are_left_to_the_operation() -> None:
    layer = nn.LSTM(4, 2).float()
    out, _ = layer(torch.randn(T, N, 4).float())
    node = next((node for node in users_of([out]) if node.name() in OPERATIONS and "Rnn" in node.name()), None)
    if node is None:
        pytest.skip("this PyTorch runs nn.LSTM in many operations")
    layouts = [Layout(0), Layout(0), Layout(0)]
    assert lstm(OperationCall(node, [torch.ones_like(out), None, None], layouts, T, torch.float32), 1) is None


def test_one_sample_of_several_sequences_is_left_to_the_operation() -> None:
    layer = nn.LSTM(4, 2).float()
    out, _ = layer(torch.randn(T, N, 4).float())
    node = next((node for node in users_of([out]) if node.name() in OPERATIONS and "Rnn" in node.name()), None)
    if node is None:
        pytest.skip("this PyTorch runs nn.LSTM in many operations")
    whole = [Layout(0, T), Layout(0), Layout(0)]
    call = OperationCall(node, [torch.ones_like(out), None, None], whole, 1, torch.float32)
    assert lstm(call, 1) is None
    assert TOGETHER[node.name()].keep(call, {1: "weight_ih_l0"}) is None
