"""Compiled functions step aside."""

from contextlib import ExitStack

import torch

from secorder._torch.stance import eager


def test_compiled_functions_run_as_they_were_written() -> None:
    calls: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.compiler.is_compiling())
        return x.exp()

    compiled = torch.compile(lambda x: x.exp(), backend="aot_eager")
    x = torch.randn(3, requires_grad=True)
    assert "CompiledFunction" in compiled(x).grad_fn.name()
    with eager():
        assert compiled(x).grad_fn.name() == "ExpBackward0"
    assert "CompiledFunction" in compiled(x).grad_fn.name()


def test_sections_that_overlap_leave_the_compiler_as_it_was() -> None:
    """As those of threads do, which do not end in the order that they began in."""
    compiled = torch.compile(torch.exp, backend="aot_eager")
    x = torch.randn(3, requires_grad=True)
    one, other = ExitStack(), ExitStack()
    one.enter_context(eager())
    other.enter_context(eager())
    one.close()
    assert compiled(x).grad_fn.name() == "ExpBackward0"
    other.close()
    assert "CompiledFunction" in compiled(x).grad_fn.name()
