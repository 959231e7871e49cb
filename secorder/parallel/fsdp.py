"""Parameters that FSDP2 (``fully_shard``) shards over the ranks: what belongs to a rank, and sums over ranks.

PyTorch's own ``DTensor`` does the work: a rank's part of a sum is a *partial* tensor, and redistributing it to the
parameter's placements is the reduce-scatter (under hybrid sharding, with an all-reduce) that leaves each rank its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch.collectives import all_reduce, require_ranks
from .._torch.fsdp import fsdp_modules, is_fsdp_hook, local
from .._torch.modules import forward_hooks_removed
from ..errors import InvalidArgumentError
from .spread import Spread


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered by all ranks together; any other tensor as it is."""
    if hasattr(tensor, "full_tensor"):
        require_ranks()
        tensor = tensor.full_tensor()
    return tensor


def part_of(tensor: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a tensor of a parameter's shape, which may be spread as the parameter, or whole."""
    if hasattr(parameter, "placements") and not hasattr(tensor, "placements"):
        from torch.distributed.tensor import distribute_tensor

        mesh = parameter.device_mesh
        tensor = distribute_tensor(
            tensor.to(mesh.device_type).view(parameter.shape), mesh, parameter.placements, src_data_rank=None
        )
    return local(tensor)


def shard_of_sum(part: Tensor, parameter: Any, spread: Spread) -> Tensor:
    """This rank's shard, flat, of the sum over ranks with samples of their own of ``part``, which each computes with.

    The part is flat, and that of the whole parameter, or of one that tensor parallelism shards.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = parameter.device_mesh
    if spread.tensor:
        mesh = mesh[tuple(mesh.mesh_dim_names[dim] for dim in spread.data)]
    kept = [parameter.placements[dim] for dim in spread.data]
    placements = [Replicate() if placement.is_replicate() else Shard(placement.dim) for placement in kept]
    partial = DTensor.from_local(part.view(spread.shape(parameter)), mesh, [Partial()] * mesh.ndim, run_check=False)
    return partial.redistribute(placements=placements).to_local().reshape(-1)


def whole_sum(part: Tensor, parameter: Any) -> Tensor:
    """The sum of all elements of what the ranks hold a part of each; without a sharded parameter, of what is here."""
    own = part.sum(dtype=torch.float64)
    for dim, placement in enumerate(getattr(parameter, "placements", ())):
        if not placement.is_replicate():
            require_ranks()
            all_reduce(own, group=parameter.device_mesh.get_group(dim))
    return own


class Shard(NamedTuple):
    """How a parameter is sharded over the ranks."""

    mesh: Any  #: the ranks
    placements: Any  #: for each dimension of the mesh
    shape: torch.Size  #: of the whole parameter
    stride: tuple[int, ...]  #: of the whole parameter
    local_shape: torch.Size  #: of this rank's shard

    @classmethod
    def of(cls, parameter: Any) -> "Shard":
        """That of a sharded parameter."""
        mesh, placements = parameter.device_mesh, parameter.placements
        return cls(mesh, placements, parameter.shape, parameter.stride(), local(parameter).shape)

    def place(self, part: Tensor) -> Tensor:
        """This rank's flat shard as a ``DTensor`` of the parameter's shape and placements."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part.view(self.local_shape),
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )


def shards(flat: Tensor, sharded: Sequence[Shard]) -> list[Tensor]:
    """For each parameter of a layer a ``DTensor``, from this rank's shards of them in one flat tensor."""
    parts = flat.split([shard.local_shape.numel() for shard in sharded])
    return [shard.place(part) for part, shard in zip(parts, sharded, strict=True)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, the model is a whole one: each rank holds all parameters, and FSDP2's hooks are off.

    A mixed-precision policy that gives parameters another dtype is refused; hooks of FSDP2 would cast inputs.
    """
    sharded = fsdp_modules(model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    try:
        for module in sharded:
            module.unshard()
        for name, p in model.named_parameters():
            if p.dtype is not dtypes[name]:
                raise InvalidArgumentError(
                    f"fully_shard has a mixed-precision policy ({name} becomes {p.dtype}), with which one-shot "
                    "measurements are not supported yet: shard without it, and use torch.autocast."
                )
        with forward_hooks_removed(model.modules(), is_fsdp_hook):
            yield
    finally:
        for module in sharded:
            module.reshard()
