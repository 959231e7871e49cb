"""The autocast state that a model runs under: read where the user calls us, set again around the user's code.

Vector-Jacobian products and contractions of ours run without it: autocast rounds what it is given to half precision.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

#: Device type → dtype, where autocast is enabled.
AutocastState = dict[str, torch.dtype]

_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")

#: Whether it is enabled for any of them.
autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled


def autocast_state() -> AutocastState:
    """What is enabled now."""
    if not autocast_enabled():
        return {}
    return {kind: torch.get_autocast_dtype(kind) for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)}


def autocast(state: AutocastState) -> AbstractContextManager[None]:
    """Run under a state that was taken."""
    return _under(state) if state else nullcontext()


@contextmanager
def _under(state: AutocastState) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype in state.items():
            stack.enter_context(torch.autocast(kind, dtype))
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Run in the dtypes that tensors have."""
    with ExitStack() as stack:
        for kind in autocast_state():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run under the state of now whenever it is called; as it is where nothing is enabled."""
    state = autocast_state()
    if not state:
        return function

    def wrapped(*args: Any) -> Any:
        with autocast(state):
            return function(*args)

    return functools.update_wrapper(wrapped, function, updated=())
