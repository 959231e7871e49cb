"""Compiled functions step aside."""

from contextlib import ExitStack
from typing import Any

import torch
from torch._dynamo import eval_frame
from torch.utils.checkpoint import checkpoint

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


def _checkpointed(compiled: Any) -> torch.Tensor:
    return checkpoint(compiled, torch.randn(3, requires_grad=True), use_reentrant=False)


def test_what_a_checkpoint_computes_again_runs_as_it_did_at_first() -> None:
    """As many tensors are to be saved; functions that are compiled elsewhere stay compiled meanwhile."""
    before = eval_frame._stance
    compiled = torch.compile(lambda x: x.exp().sin(), backend="aot_eager")
    x = torch.randn(3, requires_grad=True)
    with eager():
        inside = _checkpointed(compiled)
    outside = _checkpointed(compiled)
    assert "CompiledFunction" in compiled(x).grad_fn.name()
    inside.sum().backward()
    outside.sum().backward()
    del inside
    assert eval_frame._stance is before


def test_a_backward_that_never_comes_leaves_the_compiler_as_it_was() -> None:
    before = eval_frame._stance
    with eager():
        output = _checkpointed(torch.compile(torch.sin, backend="aot_eager"))
    with torch.compiler.set_stance("fail_on_recompile"), eager():
        pass
    assert eval_frame._stance.stance == before.stance
    del output
    assert eval_frame._stance is before
