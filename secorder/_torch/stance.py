"""The stance of ``torch.compile``: compiled functions run eagerly while somebody needs it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

__all__ = ["eager", "enter_eager", "leave_eager"]


class _Stance:
    """The one switch of the process, held by whoever is inside: the first turns it, and the last turns it back.

    It is turned at each recorded step: where it lies, since ``torch.compiler.set_stance`` makes much of a turn.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: Any = None

    @cached_property
    def compiler(self) -> Any:
        """What holds the stance; it is loaded where it is asked for first."""
        from torch._dynamo import eval_frame

        return eval_frame

    @cached_property
    def eager(self) -> Any:
        """The stance in which compiled functions run as they were written."""
        return self.compiler.DynamoStance("force_eager")


_STANCE = _Stance()


def enter_eager() -> None:
    """Until :func:`leave_eager`, compiled functions run as they were written, in every thread; several may overlap."""
    with _STANCE.lock:
        if not _STANCE.inside:
            _STANCE.before, _STANCE.compiler._stance = _STANCE.compiler._stance, _STANCE.eager
        _STANCE.inside += 1


def leave_eager() -> None:
    """As it was before, unless someone else is inside."""
    with _STANCE.lock:
        _STANCE.inside -= 1
        if not _STANCE.inside:
            _STANCE.compiler._stance = _STANCE.before


@contextmanager
def eager() -> Iterator[None]:
    """Inside, compiled functions run as they were written: what they compile to has no second derivative.

    Where the compiler is not loaded yet, nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    enter_eager()
    try:
        yield
    finally:
        leave_eager()
