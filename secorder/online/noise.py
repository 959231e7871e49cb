"""The gradient noise scale: how many samples a batch needs before its gradient is more signal than noise.

With S the mean of the squared norms of N per-sample gradients and B the squared norm of their mean, unbiased estimates
are::

    |G|² = (N B − S) / (N − 1)          the squared norm of the expected gradient
    tr Σ = (S − B) N / (N − 1)          the trace of the samples' covariance

Each is averaged over batches before the ratio tr Σ / |G|² is taken, which is the noise scale.

Sources: McCandlish, Kaplan, Amodei, et al. (2018), "An empirical model of large-batch training", appendix A.1; by layer
and from per-sample norms: Gray, Tiwari, Bergsma, Hestness (2024), "Normalization layer per-example gradients are
sufficient to predict gradient noise scale in transformers".
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..results import brief
from .norm_sums import Row


@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise of a layer, or of several.

    Attributes:
        value: ``tr Σ / |G|²``, the batch size (in samples) at which a batch's gradient is as much noise as signal; inf
            where the estimate of ``|G|²`` is not positive: then the gradient is lost in the noise of the batches seen.
        squared_norm: ``|G|²``, the estimate of the expected gradient's squared norm: unbiased, so that it may be < 0.
        variance: tr Σ, the estimate of the trace of the per-sample gradients' covariance.
    """

    value: float
    squared_norm: float
    variance: float

    __repr__ = brief

    @classmethod
    def of(cls, squared_norm: float, variance: float) -> "NoiseScale":
        """The ratio, where there is one."""
        value = variance / squared_norm if squared_norm > 0 else math.inf
        return cls(math.nan if math.isnan(squared_norm + variance) else value, squared_norm, variance)


class NoiseScales(dict[str, NoiseScale]):
    """Layer name → :class:`NoiseScale`, in ``model.named_modules()`` order.

    Attributes:
        num_samples: of the batches that they were estimated from.
    """

    def __init__(
        self, scales: Mapping[str, NoiseScale], num_samples: int, counted: Iterable[str] | None = None
    ) -> None:
        """Of these layers, of which some together hold every parameter once; all of them by default."""
        super().__init__(scales)
        self.num_samples = num_samples
        self._counted = [name for name in scales if counted is None or name in counted]

    @property
    def total(self) -> NoiseScale:
        """That of all layers' parameters together; a layer all of whose parameters others hold counts in these."""
        parts = [self[name] for name in self._counted]
        return NoiseScale.of(sum(x.squared_norm for x in parts), sum(x.variance for x in parts))


def noise_of(row: Row) -> NoiseScale | None:
    """The noise scale of one layer; None where no batch told of it."""
    if not row.noise_weight:
        return None
    return NoiseScale.of(row.signal / row.noise_weight, row.noise / row.noise_weight)
