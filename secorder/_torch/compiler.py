"""``torch.compile``, told to step aside."""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["eager", "run_eagerly"]


class _Stance:
    """The one switch of the process, held by whoever is inside: the first turns it, and the last turns it back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = ExitStack()


_STANCE = _Stance()


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Inside, compiled functions run as they were written, in every thread; passes of several threads may overlap."""
    with _STANCE.lock:
        if not _STANCE.inside:
            _STANCE.before.enter_context(torch.compiler.set_stance("force_eager"))
        _STANCE.inside += 1
    try:
        yield
    finally:
        with _STANCE.lock:
            _STANCE.inside -= 1
            if not _STANCE.inside:
                _STANCE.before.close()


@contextmanager
def eager() -> Iterator[None]:
    """:func:`run_eagerly` for passes of our own, of which compiled graphs have no second derivative.

    Nothing is compiled where the compiler is not loaded yet.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with run_eagerly():
        yield
