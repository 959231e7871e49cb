"""What is kept of the graph."""

import torch
import torch.nn.functional as F

from secorder.layers.selection import select_layers
from secorder.oneshot.hessian.layer_graph import LayerGraph, OutputSide
from secorder.oneshot.roots import Root

from ...helpers import make


def test_graphs_are_told_apart_by_identity_and_start_with_nothing() -> None:
    layer = select_layers(make())[0]
    one, other = LayerGraph(layer), LayerGraph(layer)
    assert one != other
    assert (one.output_gradients, one.residual, one.num_hvps) == ([], [], 0)
    one.residual.append(None)
    assert other.residual == []


def test_the_size_of_an_output_side_is_that_of_one_sample() -> None:
    outputs = [torch.zeros(6, 3), torch.zeros(6, 2, 2)]
    assert OutputSide(outputs, outputs, [None, None]).size == 7


def matrix_of(root: Root) -> torch.Tensor:
    pairs = root.columns(range(root.num_columns))
    assert pairs.v is None
    assert pairs.sign is None
    return torch.einsum("knc,knd->ncd", pairs.u, pairs.u)


def test_a_root_by_definition_is_that_by_products_and_needs_none() -> None:
    torch.manual_seed(0)
    point = torch.randn(6, 3, 2, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(point, torch.randint(3, (6, 2)), label_smoothing=0.1)
    gradient = torch.autograd.grad(loss, point, create_graph=True)[0]
    by_definition = OutputSide([point], [point], [None], scale=1 / 12)
    by_products = OutputSide([point], [point], [gradient])
    found = by_definition.find_root(None)
    torch.testing.assert_close(matrix_of(found), matrix_of(by_products.find_root(None)))
    assert by_definition.find_root(None) is found
