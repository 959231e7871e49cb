"""What the training loss is multiplied by before backward."""

from collections.abc import Callable
from typing import Protocol

from ..errors import InvalidArgumentError

__all__ = ["HasScale", "LossScale", "loss_scale_of"]


class HasScale(Protocol):
    """A loss scaler, such as ``torch.amp.GradScaler``."""

    def get_scale(self) -> float:
        """The factor of now."""


LossScale = float | HasScale | Callable[[], float] | None


def loss_scale_of(given: LossScale) -> Callable[[], float]:
    if given is None:
        return lambda: 1.0
    if hasattr(given, "get_scale"):
        return given.get_scale
    if callable(given):
        return given
    if not isinstance(given, (int, float)) or not given > 0:
        raise InvalidArgumentError(f"loss_scale must be a positive number or tell one, got {given!r}.")
    return lambda: float(given)
