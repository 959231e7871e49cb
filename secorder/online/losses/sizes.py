"""Does what a loss is multiplied by go with the number of samples as is told? Seen in batches of two sizes.

In one batch, a constant may be as large as the number of samples, and the size of a micro-batch over that of all whose
gradients are added up is any number. What each sample's loss is multiplied by is the same in batches of all sizes where
the loss is a sum, and goes with one over their size where it is a mean. So the first batch of another size than the
first one is looked at, whenever it comes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .powers import Path

_SUM = (
    "in batches of {} and of {} samples, the loss multiplies each sample's by the same number ({:.4g}), as a sum and "
    'no mean does: pass reduction="sum", and loss_scale= with that number (or a function that returns it, where it '
    "changes) if it is no part of the loss, as where micro-batches are weighted by their sizes."
)

_MEAN = (
    "in batches of {} and of {} samples, the loss divides each sample's by their number, as a mean and no sum does: "
    'pass reduction="mean".'
)

_ROOT = (
    "in batches of {} and of {} samples, the loss divides each sample's by the root of their number, as neither a mean "
    "nor a sum does: pass reduction= with a function of the model's arguments that returns the weights c_n of "
    "L = Σ_n c_n ℓ_n."
)

_ONE_SIZE = (
    "every batch had {} samples, so that it cannot be told whether a factor in the loss is {} number, as was assumed, "
    'or a constant: pass loss_scale=1 for the former, or reduction="{}" and loss_scale=1 for the latter.'
)

#: Of so few samples, constants are often as many, or a multiple of it.
FEW = 4


def as_a_mean(path: Path, samples: int) -> float:
    """What a path multiplies the mean over the samples by."""
    return path.scale if path.mean else path.scale * samples


@dataclass
class Sizes:
    """What was seen of the first batch."""

    samples: int = 0  #: how many it had; 0 as long as nothing was seen
    factors: Sequence[float] = ()  #: what its paths multiply the mean over them by
    compared: bool = False  #: whether one of another size was looked at
    agree: bool = False  #: whether the latest one of another size was as is specified
    assumed: str = ""  #: what was assumed of a factor, where all batches are of the same few samples

    def wants(self, samples: int) -> bool:
        """Whether a batch of so many samples is to be looked at."""
        return not self.compared and samples > 1 and self.samples not in (0, samples)

    def differ(self, paths: Collection[Path], told: str, samples: int) -> str:
        """Why a loss is not the mean, or sum, that it is told to be; empty where that does not show, or at first."""
        factors = sorted({as_a_mean(path, samples) for path in paths})
        if not self.samples:
            self.samples, self.factors = samples, factors
        if samples == self.samples:
            if samples <= FEW and not self.compared:
                self.assumed = self.assumed or _assumed(paths, told, samples)
            return ""
        self.compared, self.assumed = True, ""
        size = samples / self.samples
        as_told, otherwise = (1.0, size) if told == "mean" else (size, 1.0)  # what factors of both grow by
        before, now = _unmatched(self.factors, factors, as_told)
        self.agree = not before and not now
        if not before or not now:
            return ""
        if not any(_unmatched(before, now, size**0.5)):
            return _ROOT.format(self.samples, samples)
        if any(_unmatched(before, now, otherwise)):
            return ""
        return (_SUM if told == "mean" else _MEAN).format(self.samples, samples, now[-1] / samples)


def _assumed(paths: Collection[Path], told: str, samples: int) -> str:
    """That a factor was taken to be the number of samples, or one over it, where one was; else empty."""
    if told == "mean" and any(path.power < 0 and not path.mean for path in paths):
        return _ONE_SIZE.format(samples, "one over their", "sum")
    if told == "sum" and any(path.mean and path.likely > 0 for path in paths):
        return _ONE_SIZE.format(samples, "their", "mean")
    return ""


def _unmatched(before: Sequence[float], now: Sequence[float], growth: float) -> tuple[list[float], list[float]]:
    """The numbers before that are none of now once they have grown, and those of now that none has grown to."""
    grown = [x * growth for x in before]
    return (
        [x for x, then in zip(before, grown, strict=True) if not _among(then, now)],
        [x for x in now if not _among(x, grown)],
    )


def _among(number: float, others: Collection[float]) -> bool:
    return any(abs(number - other) <= 1e-4 * other for other in others)
