"""Hooks and ``torch.compile``: which code is traced, and hooks that run outside of a trace or not at all."""

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

from .stance import enter_eager, leave_eager

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Never compile the function's own frame; as a part of a larger graph it is traced like any other."""
    skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, default))
    return function


def never_compiled(function: Function) -> Function:
    """Neither the function nor anything that it calls is ever compiled: for hooks that the autograd engine calls."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


#: Who has asked in a graph that must be whole, where no hook of theirs can run.
_IN_WHOLE_GRAPHS: set[str] = set()

# What the tracer asks the next two while it traces is a constant to it, and a plain truth value: not every PyTorch can
# trace a comparison with the member of an enumeration.


@uncompiled
def being_compiled() -> bool:
    """Whether ``torch.compile``, or ``torch.export``, traces the caller into a graph."""
    return _translator() is not None


@uncompiled
def may_break_graph(asking: str) -> bool:
    """Whether the graph that the caller is traced into may be broken: not with ``fullgraph=True``, nor in an export.

    Where it is compiled and may not, note is taken of who was ``asking``, a name of no more than one of them.
    """
    translator = _translator()
    whole = translator is not None and translator.one_graph
    if whole and not getattr(translator, "export", False):
        _IN_WHOLE_GRAPHS.add(asking)
    return translator is not None and not whole


def in_whole_graph(asking: str) -> bool:
    """Whether who asks was compiled into a graph that must be whole (``fullgraph=True``)."""
    return asking in _IN_WHOLE_GRAPHS


_questions: tuple[Any, ...] = (being_compiled, may_break_graph)
for _question in _questions:  # as torch.compiler.assume_constant_result does
    _question._dynamo_marked_constant = True


def _translator() -> Any:
    """What traces at this moment; None where nothing does, as where the tracer is not even loaded."""
    tls = getattr(sys.modules.get("torch._dynamo.symbolic_convert"), "tls", None)
    return None if tls is None else vars(tls).get("current_tx")  # to make an error of what is missing takes longer


def hooks_prevent_compiling(module: nn.Module) -> bool:
    """Whether nothing of the module's forward is compiled where a hook of its own has broken the graph.

    That holds for PyTorch's own modules, such as ``nn.Sequential``, before PyTorch 2.12, and under
    ``nn.Module.compile`` even without a hook. The user's modules inside of them are compiled. These versions of PyTorch
    raise no error where ``fullgraph=True`` finds nothing to compile.
    """
    from torch._dynamo import trace_rules

    looks_for_hooks = "frame" in inspect.signature(trace_rules.check_verbose).parameters
    return not looks_for_hooks and bool(trace_rules.check(module.forward))


@uncompiled
def leave_graph() -> None:
    """In a function that is traced, break the graph: the function is then run by the interpreter from now on."""


leave_graph._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets


def is_traced() -> bool:
    """Whether what runs now is not computed but written down: by ``torch.export``, ``torch.jit.trace``, ``make_fx``."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    keys, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    return mode(keys.PROXY) is not None or mode(keys.FAKE) is not None


def in_compiled_backward() -> bool:
    """Whether the backward pass that runs now was compiled as a whole (compiled autograd)."""
    compiler = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiler is not None and bool(getattr(compiler, "in_compiled_autograd_region", False))


class EagerSection:
    """From now on to :meth:`end` nothing is compiled, and what is compiled may run as it was written.

    No compiled code is lost: it runs again after the end. To be made by a function that is :func:`uncompiled`.
    """

    @uncompiled  # as yet, compiling is on
    def __init__(self) -> None:
        self._callback: Any = eval_frame.set_eval_frame(None)
        self._eager = False

    def within_compiled_code(self) -> bool:
        """Whether the code around is being compiled, or was."""
        return self._callback not in (None, False)

    def whole_graph_wanted(self) -> bool:
        """Whether the code around was compiled with ``fullgraph=True``, so that it must not run eagerly."""
        return bool(getattr(getattr(self._callback, "_torchdynamo_orig_backend", None), "_one_graph", False))

    def run_compiled_code_eagerly(self) -> None:
        """Neither is what was compiled run as such."""
        enter_eager()
        self._eager = True

    def end(self) -> None:
        """As it was before."""
        if self._eager:
            leave_eager()
            self._eager = False
        eval_frame.set_eval_frame(self._callback)
