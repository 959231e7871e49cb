"""FSDP2 (``fully_shard``): the modules that it manages, the hooks that it puts on them, and a rank's own part."""

import sys
from collections.abc import Iterator
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


def flattens_parameters(module: nn.Module) -> bool:
    """Whether a module is ``FullyShardedDataParallel`` (FSDP1), which computes with flattened parameters."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return isinstance(module, getattr(loaded, "FullyShardedDataParallel", ()))


def fsdp_mesh_dims(model: nn.Module) -> dict[int, int]:
    """By ``id`` of a parameter that FSDP2 shards, how many dimensions of its mesh (the first ones) are FSDP2's own."""
    return {id(held.sharded_param): held.mesh_info.mesh.ndim for held in _held(model)}


def sharded_by_gathered(model: nn.Module) -> dict[int, nn.Parameter]:
    """By ``id`` of a whole parameter that FSDP2 puts in a sharded one's place for a while, the sharded one."""
    whole = ((getattr(held, "_unsharded_param", None), held.sharded_param) for held in _held(model))
    return {id(gathered): sharded for gathered, sharded in whole if gathered is not None}


def reshard(model: nn.Module) -> None:
    """Let FSDP2 take its shards back where it has left whole parameters: passes of our own would free them."""
    for module in fsdp_modules(model):
        module.reshard()


def _held(model: nn.Module) -> Iterator[Any]:
    """What FSDP2 keeps of each parameter that it shards."""
    for module in fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # one at most before PyTorch 2.12
        for group in filter(None, [state._fsdp_param_group] if groups is None else groups):
            yield from group.fsdp_params


def is_fsdp_hook(hook: Any) -> bool:
    """Whether a hook of a module is one of FSDP2's, which gather and free parameters and cast inputs."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")
