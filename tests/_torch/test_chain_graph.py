"""The graph of a forward as a chain of segments."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder._torch.chain_graph import Kind, batched_gradients, segments_of
from secorder._torch.vjp import gradients

N = 4


def chain_of(function: Callable[..., Tensor], *, leaves: int) -> list[tuple[str, int]]:
    """Kinds of the segments, and leaves in each, for a function of ``leaf``, which adds a leaf to what it is given."""
    added: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        added.append(torch.zeros_like(x, requires_grad=True))
        return x + added[-1]

    output = function(torch.randn(N, 3), leaf)
    assert len(added) == leaves
    return [(segment.kind.name, len(segment.leaves)) for segment in segments_of(output, added, N)]


W = torch.randn(3, 3, dtype=torch.float64)


def test_layers_and_functions_of_each_element() -> None:
    found = chain_of(lambda x, leaf: leaf(torch.tanh(leaf(x @ W)) @ W + 1), leaves=2)
    assert found == [("SAME", 1), ("SAME", 0), ("LINEAR", 0), ("ELEMENTWISE", 0), ("SAME", 1)]


def test_residual_blocks_are_segments_with_their_layers_inside() -> None:
    def block(x: Tensor, leaf: Callable[[Tensor], Tensor]) -> Tensor:
        h = leaf(x @ W)
        return h + leaf(torch.sin(leaf(h @ W)) @ W)

    assert chain_of(block, leaves=3) == [("GENERAL", 2), ("SAME", 1)]


def test_a_function_of_several_steps_on_each_element_is_one() -> None:
    found = chain_of(lambda x, leaf: (lambda h: h * torch.tanh(h) + 2 * h)(leaf(x)), leaves=1)
    assert found == [("ELEMENTWISE", 0), ("SAME", 1)]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "hardtanh": F.hardtanh, "threshold": lambda x: F.threshold(x, 0.1, 2.0),
    "abs": torch.abs, "clamp": lambda x: x.clamp(-0.5, 0.5), "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1), "neg, clone": lambda x: -x.clone(), "dropout": F.dropout,
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 1.0), "relu, abs": lambda x: (F.relu(x) - 1).abs().neg(),
    "tanh": torch.tanh, "square": lambda x: x * x, "relu of a square": lambda x: F.relu(x * x),
    "hardswish": F.hardswish, "over itself": lambda x: 1 / (x + 9), "over a number": lambda x: (2 - x) / 3 - x,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_said_to_be_piecewise_linear_have_no_second_derivative(name: str) -> None:
    x = torch.linspace(-4, 4, 3 * N, dtype=torch.float64).view(N, 3).requires_grad_(True)
    z = x * 1.0
    output = FUNCTIONS[name](z)
    segments = [segment for segment in segments_of(output, [x], N) if segment.into is not None]
    assert {segment.kind for segment in segments} <= {Kind.ELEMENTWISE, Kind.SAME}
    told = all(segment.piecewise_linear for segment in segments if segment.kind == Kind.ELEMENTWISE)
    (first,) = torch.autograd.grad(output.sum(), z, create_graph=True)
    second = torch.autograd.grad(first.sum(), z)[0] if first.requires_grad else torch.zeros(())
    assert not (told and second.any())
    assert told == (name not in ("tanh", "square", "relu of a square", "hardswish", "over itself"))


def test_it_ends_where_samples_are_mixed() -> None:
    found = chain_of(lambda x, leaf: leaf(leaf(x).cumsum(0) @ W), leaves=2)
    assert sum(leaves for _, leaves in found) == 1
    assert chain_of(lambda x, leaf: leaf(x).flip(0), leaves=1) == []


def test_a_matrix_that_depends_on_the_input_is_none() -> None:
    kinds = [kind for kind, _ in chain_of(lambda x, leaf: (lambda h: h @ (h.t() @ h))(leaf(x)), leaves=1)]
    assert "LINEAR" not in kinds


def test_samples_in_another_dimension_are_not_taken() -> None:
    model = nn.Linear(2, 2)
    found = chain_of(lambda x, leaf: leaf(model(torch.randn(N, N, 2))).sum(0), leaves=1)
    assert sum(leaves for _, leaves in found) == 0


def test_gradients_between_edges() -> None:
    x = torch.randn(N, 3, requires_grad=True)
    h = torch.tanh(x)
    (end, start) = segments_of(torch.sin(h * 2), [x], N)[0], h
    g = torch.randn(2, N, 3)
    assert end.kind == Kind.ELEMENTWISE
    expected = [torch.autograd.grad(torch.sin(start * 2), start, v, retain_graph=True)[0] for v in g]
    output = torch.sin(h * 2)
    (single,) = gradients(output, [h], [g[0]])
    (both,) = batched_gradients(output, [h], g)
    assert single is not None
    assert both is not None
    torch.testing.assert_close(single, expected[0])
    torch.testing.assert_close(both, torch.stack(expected))
