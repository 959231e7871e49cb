"""Warnings about a result: estimated, not finite."""

import math
from collections.abc import Mapping

from torch import Tensor

from .._arguments import listed
from .._caution import caution
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


def _finite(values: Tensor | Trace) -> bool:
    """By their sum, which is one pass over them; that of finite ones may overflow."""
    if isinstance(values, Trace):
        return math.isfinite(values.value)
    return math.isfinite(values.detach().sum().item()) or bool(values.isfinite().all())
