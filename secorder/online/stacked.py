"""Batches whose layers are all so small that what they cost is the calls of operations: several are added at once.

They wait as copies, so that what they were made of may be overwritten, until they are enough, or are not alike, or the
sums are read. Nothing is read on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.rank_one import RankOne
from ..layers.selection import Layer
from ..layers.side_by_side import Frame, SideBySide, columns_of
from .sums import LayerSums, add_whole, count_together

#: Batches that wait at most, and elements of their factors.
MOST, MOST_ELEMENTS = 16, 1 << 16


class Kind(NamedTuple):
    """What batches that are added at once have in common."""

    layers: tuple[Layer, ...]  #: in the order in which they come
    shape: tuple[int, int]  #: of a batch's factors side by side
    dtype: torch.dtype  #: theirs
    device: torch.device  #: theirs
    samples: int  #: of a batch
    alpha: float  #: what squares of g are multiplied by


class Stacked:
    """The batches that wait."""

    def __init__(self) -> None:
        self.waiting = 0
        self._kind: Kind | None = None
        self._frame: Frame | None = None
        self._memory: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Stacked, ()  # a copy is made when nothing waits

    def wait(
        self, layers: Sequence[RankOne], frame: Frame, samples: int, alpha: float, settle: Callable[[], None]
    ) -> None:
        """Let a batch wait; with the last that has room, ``settle`` adds all that do."""
        first, shape = layers[0].inputs, (layers[0].inputs.shape[0], sum(frame.widths))
        kind = Kind(tuple([one.layer for one in layers]), shape, first.dtype, first.device, samples, alpha)
        if self._memory is None or kind != self._kind or self.waiting == self._memory.shape[0]:  # which failed
            settle()
        if self._memory is None or kind != self._kind:
            most = max(1, min(MOST, MOST_ELEMENTS // max(1, shape[0] * shape[1])))
            self._kind, self._frame, self._memory = kind, frame, first.new_empty(most, *shape)
        columns_of([(one.inputs, one.cotangents) for one in layers], self._memory[self.waiting])
        self.waiting += 1
        if self.waiting == self._memory.shape[0]:
            settle()

    def settle(self, by_layer: Mapping[str, LayerSums], seen: Tensor, marks: dict[str, str]) -> None:
        """Add the batches that wait; their samples are counted in ``seen``, unless no layer was finite."""
        kind, batches = self._kind, self.waiting
        if not batches or kind is None:
            return
        assert self._memory is not None
        assert self._frame is not None
        together = SideBySide(self._frame, self._memory[:batches])
        goods = together.finite()
        every = {layer.name: by_layer[layer.name] for layer in kind.layers}
        outs = [dict(zip(layer.parameters, every[layer.name].sums, strict=True)) for layer in kind.layers]

        def add() -> None:
            together.add_to(outs, beta=1.0, alpha=kind.alpha)
            count_together([*every.values()], kind.samples, goods.double().sum(0).unbind(), None, batches=batches)
            seen.add_(goods.any(1).sum(), alpha=kind.samples)
            self.waiting = 0

        add_whole(every, add, marks)
