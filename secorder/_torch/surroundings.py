"""State that surrounds a user's call, and that passes of our own inside of it must leave alone.

A checkpoint counts the tensors that are saved inside of it, :func:`torch.nn.utils.parametrize.cached` keeps what
parametrizations computed, and a dispatch mode (a counter of operations, a checkpoint that selects what it keeps) takes
note of each operation. A look at what was accumulated is taken where a user evaluates, too.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import overrides
from torch.backends import cuda
from torch.nn.attention import SDPBackend
from torch.nn.utils import parametrize
from torch.utils import _python_dispatch

#: What runs the innermost ``torch.func`` transform (vmap, grad, …) now; None outside of any.
inside_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack

#: How many dispatch modes calls are made under.
count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


@contextmanager
def assigned(holders: Iterable[Any], **values: Any) -> Iterator[None]:
    """Inside, attributes of objects have other values."""
    before = [(holder, name, getattr(holder, name)) for holder in holders for name in values]
    try:
        for holder, name, _ in before:
            setattr(holder, name, values[name])
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


@contextmanager
def lasting() -> Iterator[None]:
    """Inside, what is made can be added to later, elsewhere: tensors made under ``inference_mode`` could not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def parametrizations_computed_anew() -> AbstractContextManager[None]:
    """Inside, nothing is taken from the cache of parametrizations, and nothing is put there."""
    return assigned([parametrize], _cache_enabled=0, _cache={})


@contextmanager
def unseen() -> Iterator[None]:
    """Inside, the hooks on saved tensors and the dispatch modes of outside are as if they were not there."""
    hooks, modes = _taken_off_hooks(), _taken_off_modes()
    try:
        yield
    finally:
        _put_on(modes)
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def out_of_sight(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do work of ours inside of the user's pass, of which dispatch modes of the user's are to take no note."""
    if not count_modes():
        return work(*arguments)
    modes = _taken_off_modes()
    try:
        return work(*arguments)
    finally:
        _put_on(modes)


def function_modes() -> list[Any]:
    """The function modes that calls are made under, which may count them, or compute otherwise.

    Not that of ``torch.set_default_device``, which says where new tensors are made and nothing else.
    """
    modes: list[Any] = overrides._get_current_function_mode_stack()
    of_device = getattr(sys.modules.get("torch.utils._device"), "DeviceContext", None)  # loaded where one is set
    return [mode for mode in modes if type(mode) is not of_device]


def _put_on(modes: list[Any]) -> None:
    """Put back what :func:`_taken_off_modes` took off."""
    for mode in reversed(modes):
        _python_dispatch._push_mode(mode)


def _taken_off_hooks() -> list[Any]:
    """Those on saved tensors, the innermost first."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    return hooks


def _taken_off_modes() -> list[Any]:
    """Dispatch modes, the innermost first; none where PyTorch's own are among them, which trace or fake tensors."""
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    if any(getattr(mode, "_mode_key", None) is not None for mode in modes):
        return []
    return [_python_dispatch._pop_mode() for _ in modes]


def attention_kernels() -> list[SDPBackend]:
    """Those that may be used now."""
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
    }
    return [kernel for kernel, on in enabled.items() if on]
