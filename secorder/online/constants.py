"""Constants that are kept on the device: a copy from the host would wait for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

#: Vectors that are kept.
MOST = 16


class Constants:
    """Each number once a dtype and device, and the latest vectors of them."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self._vectors: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}

    def vector(self, numbers: Sequence[float], like: Tensor) -> Tensor:
        """These numbers, at least one, in the dtype and on the device of another tensor; 1-D, not to be changed."""
        place = like.dtype, like.device
        key = (tuple(numbers), *place)
        found = self._vectors.get(key)
        if found is None:
            if len(self._vectors) >= MOST:
                self._vectors.clear()
            for number in set(numbers):
                if (number, *place) not in self._numbers:
                    self._numbers[(number, *place)] = like.new_tensor([number])
            found = self._vectors[key] = torch.cat([self._numbers[(number, *place)] for number in numbers])
        return found
