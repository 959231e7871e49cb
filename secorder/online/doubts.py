"""What is less than it was at the looks: seen on the device at each step, and read when somebody asks."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Doubts:
    """The least of numbers that are to be no less than others, by the reason why nothing is told where they are."""

    def __init__(self) -> None:
        self._least: dict[tuple[str, float, torch.dtype, torch.device], Tensor] = {}

    def expect(self, number: Tensor, value: float, reason: str) -> None:
        """A number without a graph is to be no less than this one, but for rounding; nan tells nothing."""
        key = reason, value, number.dtype, number.device
        least = self._least.get(key)
        if least is None:
            self._least[key] = number.clone()
        else:
            torch.fmin(least, number, out=least)

    def read(self) -> Sequence[str]:
        """The reasons that hold; waits for the device."""
        return [
            reason for (reason, value, kind, _), least in self._least.items() if _is_less(float(least), value, kind)
        ]


def _is_less(number: float, value: float, kind: torch.dtype) -> bool:
    return number < value * (1 - (8 * torch.finfo(kind).eps if kind.is_floating_point else 0.0))
