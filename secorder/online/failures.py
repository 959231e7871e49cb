"""How many audits each layer has failed. Both sides of an audit wait to be compared, those of several steps at once.

Whoever asks has all of them compared before, so that nothing is told later than it is seen.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .audit import Comparison
from .constants import Constants

__all__ = ["Failures"]

#: Comparisons that wait, at most.
MOST = 128


class Failures:
    """Of each layer, how many audits it has failed.

    Args:
        counts: shape ``(layers,)``, integers.
    """

    def __init__(self, counts: Tensor) -> None:
        self._counts = counts
        self._numbers: Tensor | None = None  # the sides and sizes of comparisons that wait, one step after the other
        self._waiting: list[tuple[Sequence[int], Sequence[float]]] = []  # numbers of layers, and tolerances
        self._constants = Constants()

    def __getstate__(self) -> Tensor:
        return self.counts

    def __setstate__(self, counts: Tensor) -> None:
        self.__init__(counts)  # type: ignore[misc]

    @property
    def counts(self) -> Tensor:
        """The numbers, to be read or changed in place."""
        with COMPARING:
            self._compare_all()
        return self._counts

    def _compare_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        assert self._numbers is not None
        size = len(waiting[0][0])
        numbers = self._numbers[: 3 * size * len(waiting)].view(len(waiting), 3, size)
        whole, value, square = (side.flatten() for side in numbers.unbind(1))
        difference = whole - value
        bounds = square * self._constants.vector([x for _, own in waiting for x in own], whole).square()
        failed = (difference * difference > bounds) & (whole - whole == 0)
        index = self._constants.vector([i for own, _ in waiting for i in own], self._counts)
        self._counts.index_add_(0, index, failed.to(self._counts))

    def compare(self, found: Sequence[Comparison]) -> None:
        """Compare these, now or later."""
        if not found:
            return
        indices, wholes, values, sizes, tolerances = zip(*found, strict=True)
        numbers = _alike([*wholes, *values, *sizes])
        with COMPARING:
            memory, start = self._memory(numbers[0], len(numbers))
            torch.stack(numbers, out=memory[start : start + len(numbers)])
            self._waiting.append((indices, tolerances))

    def _memory(self, like: Tensor, size: int) -> tuple[Tensor, int]:
        """Where so many numbers are to wait, and from which place on; behind as many of each step before, if any."""
        memory, start = self._numbers, size * len(self._waiting)
        fits = memory is not None and memory.dtype is like.dtype and memory.device == like.device
        room = 0 if memory is None or not fits else memory.shape[0]
        if room < start + size or (start and 3 * len(self._waiting[0][0]) != size):
            self._compare_all()
            start = 0
        if memory is None or room < size:
            self._numbers = memory = like.new_empty(max(3 * MOST, size))
        return memory, start

    def to(self, device: torch.device) -> "Failures":
        """The same on another device."""
        return Failures(self.counts.to(device))


#: Threads compare one after the other.
COMPARING = threading.Lock()


def _alike(numbers: list[Tensor]) -> list[Tensor]:
    """Of several dtypes and devices, in the widest of these, where the first of them is."""
    kinds = {(x.dtype, x.device) for x in numbers}
    if len(kinds) == 1:
        return numbers
    widest = max((dtype for dtype, _ in kinds), key=lambda dtype: torch.finfo(dtype).bits)
    return [x.to(numbers[0].device, widest) for x in numbers]
