"""``torch.compile``, told to step aside."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["eager"]


@contextmanager
def eager() -> Iterator[None]:
    """Inside, compiled functions run as they were written: their graphs have no second derivative.

    Nothing is compiled where the compiler is not loaded yet; before 2.6 PyTorch has no such switch.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with set_stance("force_eager"):
        yield
