"""What ``torch.compile`` is not to look into."""

import subprocess
import sys

from torch import Tensor

from secorder._torch.compiler import Uncompiled


def test_a_compiled_function_does_not_look_inside() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    inside: list[bool] = []

    def add_one(x: Tensor) -> Tensor:
        inside.append(torch.compiler.is_compiling())
        return x + 1

    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    own = Uncompiled(add_one)

    @torch.compile(backend=backend)
    def function(x: Tensor) -> Tensor:
        return own(x * 2).sin()

    x = torch.randn(3)
    for _ in range(3):
        torch.testing.assert_close(function(x), (x * 2 + 1).sin())
    assert inside == [False] * 3
    assert len(graphs) == 2, "what is before it, and what is after"
    assert not any("+ 1" in graph for graph in graphs)
    torch._dynamo.reset()


def test_the_compiler_is_not_loaded_for_it() -> None:
    program = "import sys; from secorder._torch.compiler import Uncompiled; assert Uncompiled(abs)(-1) == 1; "
    program += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
