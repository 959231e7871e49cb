"""How a parameter lies over the ranks: along which dimensions of its mesh by ``fully_shard``, along which in parts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """The dimensions of the mesh of a layer's parameters."""

    #: those along which FSDP2 shards (or, in hybrid sharding, replicates) parameters: samples differ
    data: tuple[int, ...]
    tensor: tuple[int, ...]  #: those along which parts of the layer lie: samples are the same

    def shape(self, parameter: Any) -> torch.Size:
        """The shape of the part of a parameter that this rank computes with: FSDP2 gathers its shards."""
        shape = list(parameter.shape)
        for dim in self.tensor:
            sharded = self.sharded_dim(parameter, dim)
            if sharded is not None:
                shape[sharded] = self.part(parameter, dim)[1]
        return torch.Size(shape)

    @staticmethod
    def sharded_dim(parameter: Any, dim: int) -> int | None:
        """Which dimension of a parameter is sharded along one of the mesh; None where all of it is on each rank."""
        placement = parameter.placements[dim]
        found: int | None = None if placement.is_replicate() else placement.dim
        return found

    def part(self, parameter: Any, dim: int) -> tuple[int, int]:
        """Of what is sharded along a dimension of the mesh: where this rank's part begins, and how much it is."""
        size = parameter.shape[parameter.placements[dim].dim]
        most = -(-size // parameter.device_mesh.size(dim))
        first = min(most * parameter.device_mesh.get_local_rank(dim), size)
        return first, min(most, size - first)

    def part_of_gradient(self, gradient: Any, parameter: Any) -> Tensor | None:
        """This rank's part of a whole gradient, which may have come as all of it; None where it is spread otherwise."""
        found: Tensor = gradient.detach()
        if not is_distributed(found):
            return found
        placements = gradient.placements
        found = gradient.detach().to_local()
        if len(placements) != len(self.tensor) or any(placement.is_partial() for placement in placements):
            return None
        for placement, dim in zip(placements, self.tensor, strict=True):
            sharded = self.sharded_dim(parameter, dim)
            if sharded is not None and placement.is_replicate():
                found = found.narrow(sharded, *self.part(parameter, dim))
            elif not placement.is_replicate() and placement.dim != sharded:
                return None
        return found

    def answers_for(self, parameter: Any) -> bool:
        """Whether a sum over the ranks with parts counts this rank's: of what all of them have, the first's alone."""
        return all(
            not parameter.placements[dim].is_replicate() or parameter.device_mesh.get_local_rank(dim) == 0
            for dim in self.tensor
        )


def is_distributed(parameter: Tensor) -> bool:
    """Whether a parameter is a ``DTensor``."""
    return hasattr(parameter, "device_mesh")
