"""Code that is traced, by ``torch.compile`` and others: hooks that are to run outside of it, or not at all."""

from collections.abc import Callable
from contextlib import ExitStack
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

from .compiler import run_eagerly

__all__ = ["EagerSection", "Graph", "being_compiled", "is_traced", "leave_graph", "uncompiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Never compile the function's own frame; as a part of a larger graph it is traced like any other."""
    code = function.__code__
    if hasattr(eval_frame, "skip_code"):
        eval_frame.skip_code(code)
    else:
        skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, default))
    return function


class Graph(IntEnum):
    """Whether ``torch.compile`` traces the caller into a graph."""

    NONE = 0
    MAY_BREAK = 1
    WHOLE = 2  # fullgraph=True, or torch.export


@uncompiled
def being_compiled() -> int:
    """The :class:`Graph` that the caller is traced into: a constant to the tracer, which evaluates it as it traces."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return int(Graph.WHOLE if InstructionTranslator.current_tx().one_graph else Graph.MAY_BREAK)
    except Exception:  # nothing is traced
        return int(Graph.NONE)


being_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what torch.compiler.assume_constant_result sets


@uncompiled
def leave_graph() -> None:
    """In a function that is traced, break the graph: the function is then run by the interpreter from now on."""


leave_graph._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets


def is_traced() -> bool:
    """Whether what runs now is not computed but written down: by ``torch.export``, ``torch.jit.trace``, ``make_fx``."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE))


class EagerSection:
    """From :meth:`begin` to :meth:`end` nothing is compiled, and what is compiled runs as it was written.

    No compiled code is lost: it runs again after the end. To be begun by a function that is :func:`uncompiled`.
    """

    @uncompiled
    def __init__(self) -> None:
        self._callback: Any = None
        self._stance = ExitStack()

    @uncompiled  # as yet, compiling is on
    def begin(self) -> None:
        """Nothing is compiled from now on."""
        self._callback = eval_frame.set_eval_frame(None)

    def whole_graph_wanted(self) -> bool:
        """Whether the code around was compiled with ``fullgraph=True``, so that it must not run eagerly."""
        return bool(getattr(getattr(self._callback, "_torchdynamo_orig_backend", None), "_one_graph", False))

    def run_compiled_code_eagerly(self) -> None:
        """Neither is what was compiled run as such."""
        self._stance.enter_context(run_eagerly())

    def end(self) -> None:
        """As it was before."""
        self._stance.close()
        eval_frame.set_eval_frame(self._callback)
