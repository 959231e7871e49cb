"""Which batches an expensive check is made on."""

from collections.abc import Hashable
from typing import Any

#: The fractional part of the golden ratio: of all numbers the worst to approximate by fractions.
GOLDEN = 0.6180339887498949


def now_and_then(count: int, one_in: int) -> bool:
    """Whether batch ``count`` is chosen: one in ``one_in`` is, also of every second, third, … batch.

    The multiples of an irrational number are evenly spread over [0, 1), and so is every k-th of them: the choice keeps
    step with no period in the user's data. It is deterministic, so that all ranks of a process group choose alike, and
    so does a run that is resumed.

    Source: Weyl (1916), "Über die Gleichverteilung von Zahlen mod. Eins".
    """
    return count * GOLDEN % 1.0 < 1.0 / one_in


class Kinds:
    """What kinds of batches were looked at: one of another kind is to be, too, at once.

    Of a model of which each batch is of a kind of its own, it is the first :attr:`FIRST`, and then ever fewer.
    """

    FIRST, MOST = 8, 4096

    def __init__(self) -> None:
        self._seen: dict[Hashable, Any] = {}
        self._others = 0  # batches of other kinds

    def is_new(self, kind: Hashable) -> bool:
        """Whether a batch of this kind is to be looked at."""
        if kind in self._seen:
            return False
        self._others += 1
        return self._others <= self.FIRST or self._others & (self._others - 1) == 0

    def saw(self, kind: Hashable, found: Any = None) -> None:
        """One was looked at, and what was found of it."""
        if len(self._seen) < self.MOST:
            self._seen[kind] = found

    def found(self, kind: Hashable) -> Any:
        """What was found of the latest of a kind that was looked at; None of another one."""
        return self._seen.get(kind)
