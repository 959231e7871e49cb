"""The graph of the one forward of a look."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secorder._torch.engine import accumulate_node
from secorder.layers.layout import Layout
from secorder.layers.selection import select_layers
from secorder.oneshot.isolation import isolate
from secorder.oneshot.recording import recorded
from secorder.online.samples.forward_graph import ForwardGraph, Watched

from ...helpers import Net


def forward(hook: Callable[[Tensor], Tensor] | None) -> ForwardGraph:
    """Of two layers whose outputs have leaves added; with a hook of the model's, perhaps, between them."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.first(x)
        if hook is not None:
            hidden.register_hook(hook)
        return m.second(hidden.tanh())

    model, x = Net(run, first=nn.Linear(4, 4), second=nn.Linear(4, 3)), torch.randn(6, 4)
    layers = select_layers(model)
    with isolate(model, None, layers) as isolated, recorded(isolated, layers, own_parameters=False) as recording:
        with Watched() as watched:
            output = isolated.run(model, x)
        leaves = [leaf for x in layers for leaf in recording.leaves[x.name]]
    return ForwardGraph(output, [[Layout()]], 6, watched.hooked, leaves)


def test_hooks_of_the_models_own_are_seen_and_ours_are_not() -> None:
    graph = forward(None)
    assert not graph.hooked
    assert graph.inner_sizes is not None
    assert {graph.inner_sizes[accumulate_node(leaf), 0] for leaf in graph.leaves} == {3, 4}
    graph = forward(lambda g: g / g.norm())
    assert graph.hooked
    assert graph.inner_sizes is None


def test_what_adds_the_leaves_is_none_of_the_models() -> None:
    graph = forward(None)
    own = [node.name() for node in graph.users if node not in graph.added and "Accumulate" not in node.name()]
    assert sorted(own) == ["AddmmBackward0", "TanhBackward0"]
    assert {node.name() for node in graph.added} == {"AddBackward0"}
    assert len(graph.added) == 2


def test_selections_by_tensors_are_counted() -> None:
    x = torch.randn(3, 4)
    with Watched() as watched:
        x[0], x[:, 1:]
        assert watched.selections == 0
        x[torch.tensor([0, 1])]
        x.nonzero()
    assert watched.selections == 2
