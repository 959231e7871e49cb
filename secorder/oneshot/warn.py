"""Warnings about a result: estimated, inexact, not finite."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .._caution import caution
from .._torch.weight_norm import second_derivative_is_exact, weight_normalised
from ..layers.selection import Layer


def warn_if_estimated(draws: Mapping[str, int]) -> None:
    """Warn once of layers that ``method="auto"`` estimated, by their draws."""
    drawn = [name for name, count in draws.items() if count]
    if drawn:
        caution(
            f"{len(drawn)} of {len(draws)} layers were estimated ({_some(drawn)}), since exact results take too long: "
            'pass method="exact" to have them all the same (estimate_cost tells how long); the result has the standard '
            "errors."
        )


def warn_if_not_finite(found: Mapping[str, Tensor], what: str) -> None:
    """Warn of curvature, by layer, that is nan or infinite at this point."""
    bad = [name for name, values in found.items() if not _finite(values.detach())]
    if bad:
        caution(
            f"the {what} of {_some(bad)} holds nan or infinite entries: the loss, or the model, has no such derivative "
            "at this point (a root or norm of zero, an overflow)."
        )


def warn_if_inexact(layers: Sequence[Layer]) -> None:
    """Warn of measured layers of which PyTorch itself has no exact second derivative."""
    bad = [x.name for x in layers if any(map(weight_normalised, x.module.modules()))]
    if bad and not second_derivative_is_exact():
        caution(
            "PyTorch's second derivative of weight_norm is not exact (it takes the norm for a constant), and neither "
            f"is the Hessian of {_some(bad)}: a parametrization of your own has an exact one "
            "(g * v / v.norm(dim=1, keepdim=True))."
        )


def _finite(values: Tensor) -> bool:
    """By their sum, which is one pass over them; that of finite ones may overflow."""
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:4]) + (", …" if len(names) > 4 else "")
