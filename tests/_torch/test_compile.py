"""Code that is traced, and sections of it that are not."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from secorder._torch.beginning import before_backward
from secorder._torch.compile import (
    EagerSection,
    being_compiled,
    hooks_prevent_compiling,
    in_compiled_backward,
    in_whole_graph,
    is_traced,
    may_break_graph,
    never_compiled,
)


def test_what_is_written_down_is_known() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(is_traced())
        return x.sin()

    function(torch.ones(2))
    make_fx(function)(torch.ones(2))
    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [False, True, True]


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_compiled_in_an_eager_section() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    section = EagerSection()
    section.run_compiled_code_eagerly()
    compiled(torch.ones(2))
    section.end()
    assert not graphs
    compiled(torch.ones(2))
    assert len(graphs) == 1
    assert not being_compiled()
    assert not may_break_graph("")
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [False, True])
def test_who_asks_in_a_whole_graph_is_noted(whole: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return x.sin() if may_break_graph(f"asks where {whole}") else x.cos()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=whole)
    x = torch.ones(2)
    assert torch.equal(compiled(x), x.cos() if whole else x.sin())
    assert in_whole_graph(f"asks where {whole}") is whole
    assert not in_whole_graph("does not ask")
    torch._dynamo.reset()


class Backend:
    """Runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> object:
        self.graphs.append(graph)
        return graph.forward


def doubled(g: Tensor) -> Tensor:
    return g * 2


def compiled_hook(g: Tensor) -> Tensor:
    return doubled(g)


@never_compiled
def uncompiled_hook(g: Tensor) -> Tensor:
    return doubled(g)


class Owner:
    pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(("hook", "graphs"), [(compiled_hook, 2), (uncompiled_hook, 1)])
def test_hooks_that_the_engine_calls_are_compiled_or_never(
    hook: Callable[[Tensor], Tensor], graphs: int, waits: bool
) -> None:
    """Also while something waits for a backward pass to begin."""
    owner = Owner()
    if waits:
        before_backward(owner, lambda *_: False, None)
    # On other devices the engine calls hooks in a thread of its own, where nothing is compiled.
    x = torch.ones(2, device="cpu", requires_grad=True)
    loss = (x * 3).sum()
    loss.register_hook(hook)
    backend = Backend()

    @torch.compile(backend=backend)
    def step(loss: Tensor) -> Tensor:
        loss.backward()
        return torch.ones(2).sin()

    step(loss)
    assert x.grad is not None
    assert x.grad.tolist() == [6, 6]
    assert len(backend.graphs) == graphs
    torch._dynamo.reset()


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [nn.Sequential, Own])
def test_whether_hooks_that_break_the_graph_prevent_compiling(kind: type[nn.Sequential]) -> None:
    model = kind(nn.Linear(2, 2), nn.Tanh())
    model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    backend = Backend()
    torch.compile(model, backend=backend)(torch.ones(1, 2))
    assert hooks_prevent_compiling(model) is not bool(backend.graphs)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_backward_that_is_compiled() -> None:
    from torch._dynamo import compiled_autograd

    seen: list[bool] = []
    for compiles in (False, True):
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda g: seen.append(in_compiled_backward()))
        y = x.sin().sum()
        with compiled_autograd._enable(torch.compile(backend="eager")) if compiles else nullcontext():
            y.backward()
    assert seen == [False, True]
    assert not in_compiled_backward()
