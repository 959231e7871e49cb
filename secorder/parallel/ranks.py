"""The ranks that hold parts of the parameters of a model, and how they learn what happens on one of them.

Along some dimensions of the device mesh ranks have samples of their own (``fully_shard``), along others the same
samples and different parts of the layers (tensor parallelism). A collective that one rank enters and another does not
hangs: so whatever decides on one is decided by all of them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch.collectives import all_reduce

#: A device mesh, and one of its dimensions.
Axis = tuple[Any, int]


@dataclass(frozen=True)
class Ranks:
    """The ranks of one model."""

    data: tuple[Axis, ...]  #: along these, ranks have samples of their own
    tensor: tuple[Axis, ...]  #: along these, ranks have the same samples and other parts of the layers

    def _numbers(self, numbers: Sequence[float]) -> Tensor:
        mesh, _ = (*self.data, *self.tensor)[0]
        return torch.tensor([float(x) for x in numbers], dtype=torch.float64, device=mesh.device_type)

    def holds(self, group: "dist.ProcessGroup") -> bool:
        """Whether ranks that share samples are in one group."""
        own = {rank for mesh, dim in self.tensor for rank in dist.get_process_group_ranks(mesh.get_group(dim))}
        return len(own & set(dist.get_process_group_ranks(group))) > 1

    def __deepcopy__(self, _: Any) -> "Ranks":
        return self  # process groups are no part of a copy

    def together(self, numbers: Sequence[float]) -> list[float]:
        """The sums of numbers over the ranks that have samples of their own; of those that share samples, the largest.

        One all-reduce for each dimension of the mesh; the numbers are read on the host.
        """
        found = self.of_all_samples(self._numbers(numbers))
        for axis, dim in self.tensor:
            all_reduce(found, op=dist.ReduceOp.MAX, group=axis.get_group(dim))
        return found.tolist()

    def any(self, flag: bool) -> bool:
        """Whether something is so on any rank."""
        return self.largest([flag])[0] > 0

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number on any rank."""
        return self.most(self._numbers(numbers)).tolist()

    def most(self, tensor: Tensor) -> Tensor:
        """The largest of each element on any rank."""
        found = tensor.clone()
        for axis, dim in (*self.data, *self.tensor):
            all_reduce(found, op=dist.ReduceOp.MAX, group=axis.get_group(dim))
        return found

    def of_all_samples(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that have samples of their own."""
        return _sum(tensor, self.data)

    def of_all_parts(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that have parts of the layers."""
        return _sum(tensor, self.tensor)


def _sum(tensor: Tensor, axes: Sequence[Axis]) -> Tensor:
    found = tensor.clone() if axes else tensor
    for axis, dim in axes:
        all_reduce(found, group=axis.get_group(dim))
    return found
