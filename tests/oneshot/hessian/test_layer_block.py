"""Diagonals in parameters from each sample's Hessian in z: by all of it, and by its diagonal where that suffices."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from secorder.layers.layout import DIM_ZERO
from secorder.layers.selection import select_layers
from secorder.oneshot.hessian.layer_block import by_basis, by_diagonal, by_diagonal_alone
from secorder.oneshot.hessian.layer_graph import LayerGraph

from ...helpers import Mixed, rule_of_mixed

N = 3


@pytest.mark.parametrize(
    ("module", "shape", "alone"),
    [
        (nn.Linear(4, 2), (4,), True),
        (nn.Linear(4, 2), (3, 4), False),
        (nn.Conv1d(1, 2, 2), (1, 3), False),
        (Mixed(), (4,), False),
    ],
    ids=["linear", "tokens", "convolution", "mixed outputs"],
)
def test_both_are_what_the_jacobian_says(module: nn.Module, shape: tuple[int, ...], alone: bool) -> None:
    torch.manual_seed(0)
    module.double()
    (layer,) = select_layers(nn.Sequential(module), "all")
    layer = replace(layer, rule=layer.rule or rule_of_mixed)
    x = torch.randn(N, *shape)
    z = module(x)
    graph = LayerGraph(layer, [(x,)], [torch.zeros_like(z, requires_grad=True)], [DIM_ZERO])
    size = z[0].numel()
    root = torch.randn(N, size, size)
    matrix = root @ root.mT
    assert by_diagonal_alone(graph) is alone
    found = [by_basis(graph, matrix, slice(0, N))]
    if alone:
        found.append(by_diagonal(graph, matrix.diagonal(dim1=1, dim2=2)))
    for index, p in enumerate(module.parameters()):
        expected = torch.zeros(p.numel())
        for n in range(N):
            rows = [torch.autograd.grad(e, p, retain_graph=True)[0].flatten() for e in module(x)[n].flatten()]
            j = torch.stack(rows)
            expected += (j * (matrix[n] @ j)).sum(0)
        for values in found:
            torch.testing.assert_close(values[index], expected)
