"""Tensors of one shape as the rows of one tensor, so that a thousand small layers take few operations."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch.collectives import all_reduce
from .._torch.fsdp import local

#: Elements that are put together, at most.
STACKED = 2**20


def stacks(tensors: Iterable[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Tensors of one shape, dtype and device as the rows of one, with their places; of a ``DTensor`` this rank's part.

    They are taken one after the other, and let go when they are stacked along a new dimension 0: a copy, of
    :data:`STACKED` elements at most; a tensor that is larger than half of that is alone, and no copy.
    """
    waiting: dict[Any, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(map(local, tensors)):
        size = tensor.numel()
        if 2 * size > STACKED:
            yield [place], tensor[None]
            continue
        alike = waiting.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        alike.append((place, tensor))
        if (len(alike) + 1) * size > STACKED:
            yield [at for at, _ in alike], torch.stack([t for _, t in alike])
            alike.clear()
    for alike in waiting.values():
        if alike:
            yield [at for at, _ in alike], torch.stack([t for _, t in alike])


def norms(tensors: Sequence[Tensor], minus: Sequence[tuple[list[int], Tensor]] | None = None) -> list[float]:
    """The Euclidean norm of each tensor, or of its difference from what :func:`stacks` gave earlier, in one transfer.

    Half precision is summed in float32. Of a ``DTensor`` it is the norm of the whole, and every rank must call this.
    """
    places: list[int] = []
    parts: list[Tensor] = []
    with torch.no_grad():
        for index, (alike, rows) in enumerate(stacks(tensors)):
            values: Any = rows if minus is None else rows - minus[index][1]
            dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
            found = torch.linalg.vector_norm(values.reshape(len(alike), -1), dim=1, dtype=dtype)
            places += alike
            parts.append(found.to(parts[0].device if parts else found.device, torch.float64))
        if not parts:
            return []
        numbers = torch.cat(parts)[torch.tensor(places, device=parts[0].device).argsort()]
        return list(_of_all_parts(tensors, numbers).tolist())


def _of_all_parts(tensors: Sequence[Any], numbers: Tensor) -> Tensor:
    """Norms of tensors from those of their parts on each rank: an all-reduce for each mesh and set of dimensions."""
    places_of: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if hasattr(tensor, "placements"):
            sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
            places_of.setdefault((tensor.device_mesh, tuple(sharded)), []).append(place)
    for (mesh, sharded), alike in places_of.items():
        squares = numbers[alike].square()
        for dim in sharded:
            all_reduce(squares, group=mesh.get_group(dim))
        numbers[alike] = squares.sqrt()
    return numbers
