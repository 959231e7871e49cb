"""Reentrant activation checkpoints of PyTorch, which ``torch.autograd.grad`` does not support."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch.utils import checkpoint

from .surroundings import assigned


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """In this thread, ``checkpoint(..., use_reentrant=True)`` calls its function as if it were not there.

    The numbers are the same; the activations are kept.
    """
    module: Any = checkpoint
    kind, owner = module.CheckpointFunction, threading.get_ident()

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """What ``checkpoint`` calls in place of its autograd function's."""
        if threading.get_ident() != owner:  # another thread trains
            return kind.apply(function, preserve, *args)
        return function(*args)

    with assigned([module], CheckpointFunction=SimpleNamespace(apply=apply)):
        yield
