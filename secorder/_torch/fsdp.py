"""FSDP2 (``fully_shard``): the modules that it manages, and the hooks that it puts on them."""

from typing import Any

import torch.distributed as dist
from torch import nn

__all__ = ["fsdp_modules", "is_fsdp_hook"]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that ``fully_shard`` was applied to."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_fsdp_hook(hook: Any) -> bool:
    """Whether a hook of a module is one of FSDP2's, which gather and free parameters and cast inputs."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")
