"""Code that is traced, and sections of it that are not."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from secorder._torch.compile import EagerSection, Graph, being_compiled, is_traced


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
    section.begin()
    section.run_compiled_code_eagerly()
    compiled(torch.ones(2))
    section.end()
    assert not graphs
    compiled(torch.ones(2))
    assert len(graphs) == 1
    assert being_compiled() == Graph.NONE
    torch._dynamo.reset()
