"""``DistributedDataParallel`` around a model: its forward speaks with the other ranks, which run none of our passes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .modules import forward_hooks_removed
from .pytree import map_tensors


@contextmanager
def within_rank(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, wrappers run what they wrap, and nothing else: no buffers are sent, and nobody is waited for."""
    modules = list(modules)
    wrappers = [m for m in modules if isinstance(m, DistributedDataParallel) and "forward" not in vars(m)]
    for wrapper in wrappers:
        vars(wrapper)["forward"] = partial(_run, wrapper)
    try:
        with forward_hooks_removed(modules, _replicates):
            yield
    finally:
        for wrapper in wrappers:
            vars(wrapper).pop("forward", None)


def _replicates(hook: Any) -> bool:
    """Whether a hook is of ``replicate``, which wraps parameters when a module is called for the first time."""
    return getattr(hook, "__module__", None) == "torch.distributed._composable.replicate"


def _run(wrapper: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    device = torch.device(wrapper.device_type, wrapper.device_ids[0]) if wrapper.device_ids else None
    dtype = getattr(wrapper.mixed_precision, "param_dtype", None)

    def as_given(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    args, kwargs = map_tensors(as_given, (args, kwargs)) if device or dtype else (args, kwargs)
    return wrapper.module(*args, **kwargs)
