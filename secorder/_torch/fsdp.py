"""FSDP2 (``fully_shard``): the modules that it manages, the hooks that it puts on them, and a rank's own part."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that lies over ranks, such as a sharded parameter; any other tensor, detached."""
    found: Tensor = tensor.detach()
    return found.to_local() if hasattr(found, "to_local") else found


def local_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of this rank's part of a tensor that lies over ranks; of any other tensor, its own."""
    return tuple(local(tensor).shape if hasattr(tensor, "to_local") else tensor.shape)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that ``fully_shard`` was applied to."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def fsdp_mesh_dims(model: nn.Module) -> dict[int, int]:
    """By ``id`` of a parameter that FSDP2 shards, how many dimensions of its mesh (the first ones) are FSDP2's own."""
    found = {}
    for module in fsdp_modules(model):
        group = module._get_fsdp_state()._fsdp_param_group
        for held in () if group is None else group.fsdp_params:
            found[id(held.sharded_param)] = held.mesh_info.mesh.ndim
    return found


def is_fsdp_hook(hook: Any) -> bool:
    """Whether a hook of a module is one of FSDP2's, which gather and free parameters and cast inputs."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")
