"""Which layers the audit of a backward covers: all of them at first, and later as many as a step pays for.

What an audit costs is mostly the calls of small operations, which are next to nothing beside a layer's own products of
matrices where these are large. Where they are small, only some of the backward passes are audited, drawn anew each
time by random numbers of its own, since penalties may be periodic. Once a layer has failed, all are looked at again.
"""

import random
from collections.abc import Sequence
from operator import attrgetter

from ...layers.selection import Layer
from ..record import ForwardRecord
from .compared import count_numbers

#: How often a layer is looked at whenever it takes part, before layers are drawn.
FIRST = 16
#: Then the layers that are looked at together, at least and at most; else half of those that take part.
LEAST, MOST = 3, 24
#: Passes that are all audited, before passes are drawn: short runs have no other to be caught in.
EACH = 256
#: Multiplications of a layer's forward beside which the audit of one number is a fortieth of its step (measured on two
#: cores, without and with several positions a sample), and the least share of the passes that are audited: of the
#: smallest layers, an audit is a quarter of a step.
WORK, SHARE = 3 << 25, 0.125

_NAME = attrgetter("name")


class Audited:
    """Draws the layers that are looked at; every run of a program draws alike, and so does each rank."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._passes = 0
        self._times: dict[str, int] = {}
        self._old: set[str] = set()  # those that were looked at so often that they are drawn
        self._shares: dict[object, float] = {}

    def draw(self, record: ForwardRecord, layers: Sequence[Layer], *, every: bool) -> set[str]:
        """The names of those that a backward's audit covers."""
        self._passes += 1
        names = list(map(_NAME, layers))
        chosen = set(names) if every else self._some(record, layers, names)
        if not self._old.issuperset(names):
            chosen |= self._young(names)
        return chosen

    def _young(self, names: Sequence[str]) -> set[str]:
        young = set(names) - self._old
        for name in young:
            self._times[name] = self._times.get(name, 0) + 1
            if self._times[name] == FIRST:
                self._old.add(name)
        return young

    def _some(self, record: ForwardRecord, layers: Sequence[Layer], names: Sequence[str]) -> set[str]:
        if self._passes > EACH and self._random.random() >= self._share(record, layers):
            return set()
        most = min(MOST, max(LEAST, len(names) // 2))
        return set(names) if len(names) <= most else set(self._random.sample(names, most))

    def _share(self, record: ForwardRecord, layers: Sequence[Layer]) -> float:
        share = self._shares.get(record.shapes)
        if share is None:
            if len(self._shares) >= MOST:
                self._shares.clear()
            share = self._shares[record.shapes] = share_of(record, layers)
        return share


def share_of(record: ForwardRecord, layers: Sequence[Layer]) -> float:
    """The share of a model's backward passes that are audited.

    By the multiplications of its layers' forwards, and how many numbers are compared: of some layers one, and of a
    recurrent one four for each of its own layers and directions.
    """
    work = numbers = 0
    for layer in layers:
        inputs = max(
            [p.numel() // p.shape[0] for p in layer.parameters.values() if p.dim() > 1 and p.numel()], default=1
        )
        work += record.layers[layer.name].elements * inputs
        numbers += count_numbers(layer.parameters)
    return min(1.0, max(SHARE, work / (WORK * max(1, numbers))))
