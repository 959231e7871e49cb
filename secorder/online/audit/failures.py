"""How many audits each layer has failed. Both sides of an audit wait to be compared, those of several steps at once.

Whoever asks has all of them compared before, so that nothing is told later than it is seen.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._torch.host_copy import begin_copy
from ..constants import Constants
from .freivalds import Comparison

#: Comparisons that wait, at most, and backward passes whose comparisons do.
MOST, MOST_PASSES = 128, 32


class Failures:
    """Of each layer, how many audits it has failed.

    ``known`` is whether any has, as far as the host knows: on an accelerator, some passes later.
    """

    def __init__(self, counts: Tensor) -> None:
        self._counts = counts
        self.known = False
        self._numbers: Tensor | None = None  # both sides and the size of each comparison that waits, one after another
        self._waiting: list[tuple[Sequence[int], Sequence[float]]] = []  # numbers of layers, and tolerances
        self._num_waiting = 0  # comparisons that wait
        self._constants = Constants()
        self._arrives: Callable[[], Tensor] | None = None  # the numbers, on their way to the host

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

    def read(self) -> list[int]:
        """The numbers on the host, which waits for them."""
        found: list[int] = self.counts.tolist()
        self.known = any(found)
        return found

    def _compare_all(self) -> None:
        waiting, count = self._waiting, self._num_waiting
        self._waiting, self._num_waiting = [], 0
        if not waiting:
            return
        assert self._numbers is not None
        whole, value, square = self._numbers[: 3 * count].view(-1, 3).unbind(1)
        difference = whole - value
        bounds = square * self._constants.vector([x for _, own in waiting for x in own], whole).square()
        failed = (difference * difference > bounds) & (whole - whole == 0)
        index = self._constants.vector([i for own, _ in waiting for i in own], self._counts)
        self._counts.index_add_(0, index, failed.to(self._counts))
        self._tell_host()

    def _tell_host(self) -> None:
        """Let the host know whether an audit has failed; of an accelerator, by a copy that is read the next time."""
        if self._counts.device.type == "cpu":
            self.known = any(self._counts.tolist())
        elif self._counts.is_cuda:
            self.known = self.known or (self._arrives is not None and any(self._arrives().tolist()))
            self._arrives = begin_copy(self._counts)

    def compare(self, found: Sequence[Comparison]) -> None:
        """Compare these, now or later."""
        if not found:
            return
        indices, wholes, values, sizes, tolerances = zip(*found, strict=True)
        numbers = _alike([x for three in zip(wholes, values, sizes, strict=True) for x in three])
        with COMPARING:
            memory = self._memory(numbers[0], len(numbers))
            torch.stack(numbers, out=memory)
            self._waiting.append((indices, tolerances))
            self._num_waiting += len(found)

    def _memory(self, like: Tensor, size: int) -> Tensor:
        """Where so many numbers are to wait, behind those that do."""
        memory = self._numbers
        fits = memory is not None and memory.dtype is like.dtype and memory.device == like.device
        room = 0 if memory is None or not fits else memory.shape[0]
        if room < 3 * self._num_waiting + size or len(self._waiting) >= MOST_PASSES:
            self._compare_all()
        if memory is None or room < size:
            self._numbers = memory = like.new_empty(max(3 * MOST, size))
        return memory.narrow(0, 3 * self._num_waiting, size)

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
