"""What is kept of the graph."""

import torch

from secorder.layers.selection import select_layers
from secorder.oneshot.hessian.layer_graph import LayerGraph, OutputSide

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
