"""The ranks that hold parts of the parameters of a model, and how they learn what happens on one of them.

Along some dimensions of the device mesh ranks have samples of their own (``fully_shard``), along others the same
samples and different parts of the layers (tensor parallelism). A collective that one rank enters and another does not
hangs: so whatever decides on one is decided by all of them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch.collectives import all_reduce
from ..errors import AttributionError

#: What is said of what one rank cannot tell.
ELSEWHERE = "another rank could not measure it: the warnings of that rank say why."

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
        return _reduced(self.of_all_samples(self._numbers(numbers)), self.tensor, dist.ReduceOp.MAX).tolist()

    def any(self, flag: bool) -> bool:
        """Whether something is so on any rank."""
        return self.largest([flag])[0] > 0

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number on any rank."""
        return self.most(self._numbers(numbers)).tolist()

    def most(self, tensor: Tensor) -> Tensor:
        """The largest of each element on any rank."""
        return _reduced(tensor, (*self.data, *self.tensor), dist.ReduceOp.MAX)

    def agree(self, layer: str, *, bad: bool) -> bool:
        """Whether a layer's batch, of which this rank has formed its part, is bad on any rank.

        Raises :class:`AttributionError` where a rank could not form its part, or formed that of another layer.
        """
        found, failed, last, first = self.largest([bad, False, *_number(layer)])
        if failed:
            raise AttributionError(ELSEWHERE)
        if last != -first:
            raise AttributionError(
                "the ranks reach their layers in different orders, so that their parts cannot be added up: let the "
                "model call its layers in one order on every rank, or leave them out with layers=."
            )
        return found > 0

    def give_up(self, layer: str) -> None:
        """Take part in :meth:`agree` where this rank cannot form its part, so that no other waits for it."""
        self.largest([True, True, *_number(layer)])

    def of_all_samples(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that have samples of their own."""
        return _reduced(tensor, self.data)

    def of_all_parts(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that have parts of the layers."""
        return _reduced(tensor, self.tensor)


def _reduced(tensor: Tensor, axes: Sequence[Axis], op: "dist.ReduceOp.RedOpType | None" = None) -> Tensor:
    """A tensor reduced over some dimensions of a mesh: its sum if no ``op`` is given."""
    found = tensor.clone() if axes else tensor
    for axis, dim in axes:
        all_reduce(found, op=op, group=axis.get_group(dim))
    return found


def _number(layer: str) -> tuple[int, int]:
    """What stands for a layer, and its negative: by the largest of both all ranks see whether they mean one layer."""
    number = crc32(layer.encode())
    return number, -number
