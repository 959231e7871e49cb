"""Warnings about a result: estimated, inexact, not finite."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .._arguments import listed
from .._caution import caution
from .._torch.weight_norm import second_derivative_is_exact, weight_normalised
from ..layers.selection import Layer
from ..results import LayerInfo
from .trace import Trace

#: Of what is not finite, why.
NO_SUCH_DERIVATIVE = (
    "{} holds nan or infinite entries: the loss, or the model, has no such derivative at this point (a root or norm of "
    "zero, an overflow)."
)


def warn_if_estimated(found: Mapping[str, LayerInfo | Trace]) -> None:
    """Warn once of layers that ``method="auto"`` estimated."""
    drawn = {name: one.relative_error for name, one in found.items() if one.num_draws}
    if drawn:
        caution(
            f"{len(drawn)} of {len(found)} layers {'was' if len(drawn) == 1 else 'were'} estimated "
            f"({listed(list(drawn))}), with relative standard errors of up to {max(drawn.values()):.2g}, since exact "
            'results take more than is allowed: pass method="exact" to have them anyway (estimate_cost tells how long).'
        )


def warn_if_not_finite(found: Mapping[str, Tensor | Trace], what: str) -> None:
    """Warn of curvature, by layer, that is nan or infinite at this point."""
    bad = [name for name, values in found.items() if not _finite(values)]
    if bad:
        caution(NO_SUCH_DERIVATIVE.format(f"the {what} of {listed(bad)}"))


def warn_if_inexact(layers: Sequence[Layer]) -> None:
    """Warn of measured layers of which PyTorch itself has no exact second derivative."""
    bad = [x.name for x in layers if any(map(weight_normalised, x.module.modules()))]
    if bad and not second_derivative_is_exact():
        caution(
            "PyTorch's second derivative of weight_norm is not exact (it takes the norm for a constant), and neither "
            f"is the Hessian of {listed(bad)}: a parametrization of your own has an exact one "
            "(g * v / v.norm(dim=1, keepdim=True))."
        )


def _finite(values: Tensor | Trace) -> bool:
    """By their sum, which is one pass over them; that of finite ones may overflow."""
    if isinstance(values, Trace):
        return math.isfinite(values.value)
    return math.isfinite(values.detach().sum().item()) or bool(values.isfinite().all())
