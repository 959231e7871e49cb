"""What is said of a result besides its numbers."""

import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CurvatureWarning

__all__ = ["warn_if_estimated", "warn_if_not_finite"]


_LIBRARY = f"{Path(__file__).parent.parent}{os.sep}"


def _warn(message: str) -> None:
    """Where the library was called."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, CurvatureWarning, stacklevel=level)


def warn_if_estimated(draws: Mapping[str, int]) -> None:
    """Warn once of layers that ``method="auto"`` estimated.

    Args:
        draws: by layer, 0 where it is exact.
    """
    drawn = [name for name, count in draws.items() if count]
    if drawn:
        _warn(
            f"{len(drawn)} of {len(draws)} layers were estimated ({_some(drawn)}), since exact ones would take long: "
            'pass method="exact" for exact ones, or see estimate_cost; their errors are in the result.'
        )


def warn_if_not_finite(found: Mapping[str, Tensor], what: str) -> None:
    """Warn of curvature that is nan or infinite at this point.

    Args:
        found: by layer.
        what: it is.
    """
    bad = [name for name, values in found.items() if not _finite(values.detach())]
    if bad:
        _warn(
            f"the {what} of {_some(bad)} holds nan or infinite entries: the loss, or the model, has no such derivative "
            "at this point (a root or norm of zero, an overflow)."
        )


def _finite(values: Tensor) -> bool:
    """By their sum, which is one pass over them; that of finite ones may overflow."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:4]) + (", …" if len(names) > 4 else "")
