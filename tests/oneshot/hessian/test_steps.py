"""What carrying a Hessian through segments takes: slopes as calculus has them, and no more than is asked for."""

import pytest
import torch
from torch import Tensor, nn

from secorder._torch.chain_graph import Kind, segments_of
from secorder.layers.selection import select_layers
from secorder.oneshot.hessian.layer_graph import LayerGraph
from secorder.oneshot.hessian.steps import Step, factors_pay, steps_of

N = 4


def steps(activation: nn.Module) -> tuple[list[Step], Tensor, Tensor]:
    """Of three layers with an activation between them; the last layer's weight, and the output's gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 5), activation, nn.Linear(5, 2)).double()
    x, graphs, leaves = torch.randn(N, 2, dtype=torch.float64), {}, []
    layers = {layer.module: layer for layer in select_layers(model, "all")}
    for module in model:
        inputs = x.detach()
        x = module(x)
        if module in layers:
            leaf = torch.zeros_like(x, requires_grad=True)
            leaves.append(leaf)
            graphs[id(leaf)] = LayerGraph(layers[module], [(inputs,)], [leaf])
            x = x + leaf
    gradient = torch.randn_like(x)
    last: nn.Module = model[-1]
    assert isinstance(last, nn.Linear)
    return steps_of(segments_of(x, leaves, N), graphs, gradient), last.weight.detach(), gradient


def test_slopes_are_those_of_calculus() -> None:
    found, weight, gradient = steps(nn.Tanh())
    step = next(s for s in found if s.segment.kind == Kind.ELEMENTWISE)
    assert step.first is not None
    assert step.second is not None
    h = (1 - step.first).sqrt()  # of tanh, up to its sign
    torch.testing.assert_close(step.second.abs(), (2 * h * step.first * (gradient @ weight)).abs())


def test_what_is_piecewise_linear_needs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(_: Step) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("secorder.oneshot.hessian.steps._gradient_before", asked)
    found, _, _ = steps(nn.ReLU())
    with pytest.raises(AssertionError):
        steps(nn.Tanh())
    assert all(s.second is None for s in found)
    assert all(bool(((s.first == 0) | (s.first == 1)).all()) for s in found if s.first is not None)


def test_nothing_but_diagonals_is_asked_for_before_the_last_matrix() -> None:
    found, _, _ = steps(nn.Tanh())
    matrices = [s for s in found if s.segment.kind == Kind.LINEAR]
    assert [s.diagonal for s in matrices] == [False, True]
    assert [s.last for s in found].index(True) == len(found) - 1


def test_factors_are_kept_over_few_layers() -> None:
    assert [factors_pay([8] * k) for k in range(2, 7)] == [False, True, True, False, False]
    assert not factors_pay([64, 4, 4, 4])  # a matrix of the narrow layer is small, factors of the wide one are not
    assert not any(step.factored for step in steps(nn.Tanh())[0])  # of one matrix, no more than a diagonal is asked for
