"""The trace of each layer's empirical Fisher, and its standard error over samples.

    tr F = (1/N) Σ_n ‖∂ℓ_n/∂θ‖²

where the diagonal is accumulated, its sum; else from the norms alone, without a tensor of the parameters' size.
"""

import math

from ..oneshot.trace import Trace
from .norm_sums import Row


def trace_of(row: Row, value: float | None, samples: float, effective: float) -> Trace:
    """The trace of one layer, by the sum of its diagonal, where that is accumulated, else by its norms."""
    if not row.weight:
        assert value is not None
        return Trace(value, math.nan, 0, True, round(samples))
    mean = row.squares / row.weight
    variance = max(row.fourth / row.weight - mean**2, 0.0)
    error = math.sqrt(variance / (effective - 1)) if effective > 1 else math.inf
    return Trace(mean if value is None else value, error, 0, True, round(samples))


def effective_samples(samples: float, batches: float, weight: float, decay: float | None) -> float:
    """As many samples that weigh the same tell as much as a moving average of batches of one size.

    The weights of k batches are (1 − β) βʲ, with the sum W = 1 − βᵏ and the sum of squares W (2 − W) (1 − β) / (1 + β).
    """
    if decay is None:
        return samples
    return samples / batches * weight / (2 - weight) * (1 + decay) / (1 - decay)
