"""What is to be done before a backward pass begins, while the graph still holds what it has saved.

PyTorch has no hook there: those on tensors come when all that is above them has run, and was freed. While something
waits for it, the function by which ``torch.autograd`` enters its engine is one of ours, that calls it.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .compile import never_compiled, uncompiled

#: What is called with its owner, the tensors that the pass begins at and the gradients on these, and tells whether that
#: was the pass that it waited for.
Work = Callable[[Any, Sequence[Tensor], Sequence[Tensor | None]], bool]

_NAME = "_engine_run_backward"

#: By its owner: the work, and the ``id`` of that for which it is done.
_waiting: "dict[ref[Any], tuple[Work, int]]" = {}
_CHANGING = threading.RLock()


class _Entry:
    """In the place of the function by which the engine is entered."""

    def __init__(self, entered: Callable[..., Any]) -> None:
        self.entered = entered

    @uncompiled  # but hooks that the engine calls are, where they were before
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("accumulate_grad") and len(args) > 1:  # and not torch.autograd.grad
            _tell(args[0], args[1])
        return self.entered(*args, **kwargs)


@never_compiled
def _tell(ends: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """A backward pass begins: do what waits for it."""
    for key, (work, _) in _waiting.copy().items():
        owner = key()
        if owner is None or (key in _waiting and work(owner, ends, gradients)):
            _forget(key)


def tells_beginnings() -> bool:
    """Whether this PyTorch enters its engine by the function that is known here."""
    return hasattr(torch.autograd, _NAME)


def before_backward(owner: Any, work: Work, of: Any) -> None:
    """Call ``work`` before backward passes that accumulate, until it returns True, or its owner is gone.

    The owner is kept alive by the graph, such as by a hook on it, and neither it nor ``of`` (for :func:`wait_no_more`)
    here. What the work raises, the user's backward does.
    """
    if not tells_beginnings():
        return
    with _CHANGING:
        _waiting[ref(owner, _forget)] = work, id(of)
        now = getattr(torch.autograd, _NAME)
        if not isinstance(now, _Entry):
            setattr(torch.autograd, _NAME, _Entry(now))


def waits(owner: Any) -> bool:
    """Whether an owner's work has not been done yet."""
    return ref(owner) in _waiting


def wait_no_more(of: Any = None, owners: Collection[int] = ()) -> None:
    """Take back all that waits for one thing, or is some owners', by ``id``."""
    for key, (_, number) in _waiting.copy().items():
        if number == id(of) or id(key()) in owners:
            _forget(key)


def _forget(key: "ref[Any]") -> None:
    with _CHANGING:
        _waiting.pop(key, None)
        now = getattr(torch.autograd, _NAME)
        if not _waiting and isinstance(now, _Entry):
            setattr(torch.autograd, _NAME, now.entered)
