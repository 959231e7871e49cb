"""Diagonals in parameters from each sample's Hessian in z: by all of it, and by its diagonal where that suffices."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from secorder.layers.layout import DIM_ZERO
from secorder.layers.selection import select_layers
from secorder.oneshot.hessian.block import Block
from secorder.oneshot.hessian.layer_block import by_block, by_diagonal, by_diagonal_alone
from secorder.oneshot.hessian.layer_graph import LayerGraph

from ...helpers import Mixed, rule_of_mixed

N = 3


@pytest.mark.parametrize(
    ("module", "shape", "alone"),
    [
        (nn.Linear(4, 2), (4,), True),
        (nn.Linear(4, 2), (3, 4), False),
        (nn.Conv1d(1, 2, 2), (1, 3), False),
        (nn.Conv2d(4, 2, 3, 2, 1, groups=2), (4, 5, 6), False),
        (nn.Conv2d(1, 2, 2, padding=1, padding_mode="circular"), (1, 3, 3), False),
        (nn.ConvTranspose1d(2, 2, 2), (2, 3), False),
        (nn.LayerNorm(4), (3, 4), False),
        (nn.Embedding(5, 3), (), False),
        (Mixed(), (4,), False),
    ],
    ids=["linear", "tokens", "convolution", "groups", "circular", "transposed", "norm", "table", "mixed outputs"],
)
def test_both_are_what_the_jacobian_says(module: nn.Module, shape: tuple[int, ...], alone: bool) -> None:
    torch.manual_seed(0)
    module.double()
    (layer,) = select_layers(nn.Sequential(module), "all")
    layer = replace(layer, rule=layer.rule or rule_of_mixed)
    x = torch.randint(5, (N, 2)) if isinstance(module, nn.Embedding) else torch.randn(N, *shape)
    z = module(x)
    graph = LayerGraph(layer, [(x,)], [torch.zeros_like(z, requires_grad=True)], [DIM_ZERO])
    size = z[0].numel()
    u, w, d = torch.randn(N, 2, size), torch.randn(N, 2), torch.randn(N, size)
    columns = Block(u, u, w, d)
    matrix = columns.full().clone()
    assert by_diagonal_alone(graph) is alone
    found = [by_block(graph, block, slice(0, N)) for block in (columns, Block(matrix=matrix.transpose(0, 1)))]
    by_samples = [by_block(graph, columns.of_samples(here), here) for here in (slice(0, 1), slice(1, N))]
    found.append([a + b for a, b in zip(*by_samples, strict=True)])
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


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3), nn.Linear(3, 4)], ids=["convolution", "tokens"])
def test_few_columns_form_no_matrix(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
    monkeypatch.setattr(Block, "full", lambda self: pytest.fail("all of H_z was multiplied out"))
    (layer,) = select_layers(nn.Sequential(module.double()), "all")
    x = torch.randn(N, 3, 6, 6) if isinstance(module, nn.Conv2d) else torch.randn(N, 6, 3)
    z = module(x)
    graph = LayerGraph(layer, [(x,)], [torch.zeros_like(z, requires_grad=True)], [DIM_ZERO])
    u = torch.randn(N, 2, z[0].numel())
    assert len(by_block(graph, Block(u, u, d=u[:, 0]), slice(0, N))) == 2
