"""Summaries of diagonals: moments, shares and histograms of many layers, in one device-to-host transfer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._sharing import counted_once
from ..errors import InvalidTypeError
from ..results import Diagonals
from .names import shown
from .stacks import stacks
from .watched import Watched

__all__ = ["get_layer_curvature_stats", "layer_statistics", "summarize"]

#: What is told of every diagonal. ``negative`` is the share of negative entries, ``zero`` and ``nonfinite`` likewise.
STATISTICS = ("mean", "std", "max", "min", "trace", "negative", "zero", "nonfinite")

#: Bins of a histogram.
BINS = 32

#: Entries of a large layer that are looked at in float64 at a time: as many as stay near the processor.
PART = 2**16

#: Entries from which on each diagonal in the host's memory is looked at by itself.
ALONE = 2**13

#: The golden ratio less one, whose multiples, modulo 1, lie evenly.
GOLDEN = (5**0.5 - 1) / 2

#: How small a part of the sum of squares the spread about the mean may be where it is their difference.
SPREAD = 1e-3


def get_layer_curvature_stats(layer_curvatures: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation, maximum and minimum of each layer's diagonal.

    Args:
        layer_curvatures: layer name → tensor of any shape and floating-point dtype, as the diagonal functions return
            it.

    Returns:
        layer name → ``{"mean", "std", "max", "min"}``, Python floats. ``std`` is the sample standard deviation
        ``sqrt(Σ (d − mean)² / (n − 1))``, 0 for a single element; an empty tensor gives nan. All layers travel to
        the host in one transfer.

    Raises:
        InvalidTypeError: ``layer_curvatures`` is no mapping, or a value is not a tensor of real floating-point numbers.

    Example:
        >>> import torch
        >>> from secorder import get_layer_curvature_stats
        >>> get_layer_curvature_stats({"fc": torch.tensor([1.0, 3.0])})["fc"]["mean"]
        2.0
    """
    return {
        name: {key: row[key] for key in ("mean", "std", "max", "min")}
        for name, row in layer_statistics(layer_curvatures).items()
    }


def layer_statistics(layer_curvatures: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """All :data:`STATISTICS` of each layer's diagonal.

    Args:
        layer_curvatures: layer name → tensor of any shape and floating-point dtype.

    Returns:
        layer name → the four of :func:`get_layer_curvature_stats`, the ``trace`` (sum of the entries) and the shares of
        ``negative``, ``zero`` and ``nonfinite`` entries; Python floats, from one transfer.

    Raises:
        InvalidTypeError: as :func:`get_layer_curvature_stats`.

    Example:
        >>> import torch
        >>> from secorder.monitor.statistics import layer_statistics
        >>> row = layer_statistics({"fc": torch.tensor([1.0, -3.0, 0.0, 4.0])})["fc"]
        >>> row["trace"], row["negative"], row["zero"]
        (2.0, 0.25, 0.25)
    """
    return {name: summary.statistics for name, summary in _summaries(layer_curvatures, histograms=False).items()}


@dataclass(frozen=True)
class LayerSummary:
    """Statistics of one layer's diagonal."""

    statistics: dict[str, float]  #: :data:`STATISTICS` by name
    low: float  #: smallest ``log10 |entry|`` of the finite, non-zero entries; nan where there are none
    high: float  #: the largest
    counts: list[float]  #: their histogram in ``log10 |entry|``, equal bins from ``low`` to ``high``
    sum: float  #: of their ``log10 |entry|``
    sum_squares: float  #: of their squares


def merged(parts: Sequence[tuple[int, LayerSummary]]) -> LayerSummary:
    """The summary of several diagonals, each with its number of entries, as one: exact but for the histogram's bins."""
    rows = [(n, part.statistics) for n, part in parts if n] or [(n, part.statistics) for n, part in parts]
    total = sum(n for n, _ in rows)
    shared = {
        key: sum(n * row[key] for n, row in rows) / total if total else math.nan
        for key in ("mean", "negative", "zero", "nonfinite")
    }
    squares = sum((n - 1) * row["std"] ** 2 + n * (row["mean"] - shared["mean"]) ** 2 for n, row in rows)
    statistics = {
        **shared,
        "std": math.sqrt(squares / (total - 1)) if total > 1 else 0.0,
        "max": _extreme(max, [row["max"] for _, row in rows]),
        "min": _extreme(min, [row["min"] for _, row in rows]),
        "trace": sum(row["trace"] for _, row in rows),
    }
    known = [part for _, part in parts if not math.isnan(part.low)]
    low, high = min((p.low for p in known), default=math.nan), max((p.high for p in known), default=math.nan)
    counts = [sum(bins) for bins in zip([0.0] * BINS, *(rebinned(p, low, high, BINS) for p in known), strict=True)]
    sums = sum(p.sum for p in known), sum(p.sum_squares for p in known)
    return LayerSummary({key: statistics[key] for key in STATISTICS}, low, high, counts, *sums)


def rebinned(part: LayerSummary, low: float, high: float, bins: int) -> list[float]:
    """A histogram in other bins; what lies outside of them is in the outermost ones."""
    counts = [0.0] * bins
    step = (part.high - part.low) / len(part.counts)
    for index, count in enumerate(part.counts):
        at = (part.low + step * (index + 0.5) - low) / max(high - low, 1e-12) * bins
        counts[min(max(int(at), 0), bins - 1)] += count
    return counts


def _extreme(choose: Callable[[list[float]], float], values: list[float]) -> float:
    """The largest or smallest; nan where one is, as tensors tell it."""
    return math.nan if any(map(math.isnan, values)) else choose(values)


def summarize(layer_curvatures: Mapping[str, Tensor], *, entries: int | None = None) -> dict[str, LayerSummary]:
    """Statistics and a histogram on a logarithmic scale of each layer's diagonal, in one transfer.

    Args:
        layer_curvatures: layer name → tensor of any shape and floating-point dtype.
        entries: the histogram of a layer that has many more is that of about so many, evenly spread; None for all.

    Raises:
        InvalidTypeError: as :func:`get_layer_curvature_stats`.

    Example:
        >>> import torch
        >>> from secorder.monitor.statistics import summarize
        >>> summary = summarize({"fc": torch.tensor([0.01, 1.0, -100.0, 0.0])})["fc"]
        >>> summary.low, summary.high, summary.statistics["negative"], summary.statistics["zero"]
        (-2.0, 2.0, 0.25, 0.25)
    """
    return _summaries(layer_curvatures, histograms=True, entries=entries)


def _summaries(
    layer_curvatures: Mapping[str, Tensor], *, histograms: bool, entries: int | None = None
) -> dict[str, LayerSummary]:
    _require_real_tensors(layer_curvatures)
    if not layer_curvatures:
        return {}
    names = list(layer_curvatures)
    device = next(iter(layer_curvatures.values())).device
    places, parts = [], []
    with torch.no_grad():
        diagonals = layer_curvatures.whole() if isinstance(layer_curvatures, Diagonals) else layer_curvatures.values()
        for alike, stacked in stacks(d if d.dim() == 1 else d.flatten() for d in diagonals):
            places += alike
            parts.append(_numbers(stacked, histograms, entries).to(device))
        numbers = torch.cat(parts).tolist()
    known = len(STATISTICS)
    result = {}
    for place, row in sorted(zip(places, numbers, strict=True)):
        low, high, total, squares, *counts = row[known:] if histograms else [torch.nan] * 4
        statistics = dict(zip(STATISTICS, row[:known], strict=True))
        result[names[place]] = LayerSummary(statistics, low, high, counts, total, squares)
    return result


def _require_real_tensors(layer_curvatures: Mapping[str, Tensor]) -> None:
    if not isinstance(layer_curvatures, Mapping):
        got = type(layer_curvatures).__name__
        raise InvalidTypeError(
            f"curvatures must be a mapping of layer names to tensors, got {got}: pass what fisher_diagonal() returns."
        )
    for name, diagonal in layer_curvatures.items():
        if not isinstance(diagonal, Tensor) or not diagonal.is_floating_point():
            got = diagonal.dtype if isinstance(diagonal, Tensor) else type(diagonal).__name__
            raise InvalidTypeError(f"the curvature of layer {name!r} must be a tensor of real numbers, got {got}.")
        if diagonal.layout != torch.strided or diagonal.is_meta:
            kind = "a tensor on the meta device" if diagonal.is_meta else diagonal.layout
            raise InvalidTypeError(f"the curvature of layer {name!r} must be dense, and hold numbers, got {kind}.")


def _numbers(given: Tensor, histograms: bool, entries: int | None = None) -> Tensor:
    """Of each row, in float64: statistics, then low, high, sum, sum of squares and counts of the histogram.

    Nothing is read on an accelerator.
    """
    rows, size = given.shape
    if size == 0:
        empty = torch.full((rows, len(STATISTICS)), torch.nan, dtype=torch.float64, device=given.device)
        more = [empty.new_full((rows, 4), torch.nan), empty.new_zeros(rows, BINS)]
        return torch.cat([empty, *more], 1) if histograms else empty
    moments = _each_plain(given) if size > ALONE and given.is_cpu else None
    moments = _moments(given) if moments is None else moments
    if not histograms:
        return moments
    return torch.cat([moments, _histograms(given if entries is None else _some(given, entries))], 1)


def _some(given: Tensor, entries: int) -> Tensor:
    """About so many entries of each row, spread evenly and, between the steps, by multiples of the golden ratio.

    Steps of one length would meet the shape of a weight: each 144th entry of 3×3 kernels is one and the same tap.
    """
    step = given.shape[1] / entries
    if step < 2:
        return given
    steps = torch.arange(entries, dtype=torch.float64, device=given.device)
    return given[:, ((steps + steps * GOLDEN % 1) * step).long()]


def _moments(given: Tensor) -> Tensor:
    """:data:`STATISTICS` of each row.

    The operations are those that take least: of a million entries on a CPU, ``std`` and ``aminmax`` take ten times as
    long as what stands here, and sums of booleans five times if not told their dtype.
    """
    size = given.shape[1]
    values = given.double()
    total = values.sum(1)
    mean = total / size
    std = torch.linalg.vector_norm(values - mean[:, None], dim=1) / max(size - 1, 1) ** 0.5
    counted = torch.int32 if size < 2**31 else torch.int64
    kinds = given < 0, given == 0, ~(given.abs() < torch.inf)
    shares = [where.sum(1, dtype=counted).double() / size for where in kinds]
    return torch.stack([mean, std, values.amax(1), values.amin(1), total, *shares], 1)


def _each_plain(given: Tensor) -> Tensor | None:
    """:func:`_plain_moments` of each row; None where one has none."""
    found = []
    for row in given:
        own = _plain_moments(row)
        if own is None:
            return None
        found.append(own)
    return torch.cat(found)


def _plain_moments(values: Tensor) -> Tensor | None:
    """:data:`STATISTICS` of entries in the host's memory that are finite and nowhere negative, as those of a Fisher.

    Each is looked at a few times in place of a dozen; float64 is at hand for a part of them at a time. None where
    entries are others, or so near to one another that their spread would be lost in rounding.
    """
    low, high = values.amin(), values.amax()
    if not (low >= 0 and high < torch.inf):
        return None
    size = values.numel()
    total, squares = torch.zeros(2, dtype=torch.float64)
    for part in values.split(PART):
        part = part.double()
        total += part.sum()
        squares += torch.dot(part, part)
    spread = squares - total**2 / size
    if not spread > SPREAD * squares:
        return None
    none = torch.zeros_like(total)
    zero = none if low > 0 else (size - values.count_nonzero()).double() / size
    found = [total / size, (spread / (size - 1)).sqrt(), high, low, total, none, zero, none]
    return torch.stack([number.double() for number in found])[None]


def _histograms(values: Tensor) -> Tensor:
    """Of each row low, high, sum, sum of squares and counts of ``log10 |entry|``."""
    logs = values.double().abs().log10()
    here = logs.isfinite()
    infinity = logs.new_full((), torch.inf)
    low, high = torch.where(here, logs, infinity).amin(1), torch.where(here, logs, -infinity).amax(1)
    kept = torch.where(here, logs, 0.0)
    position = (kept - low[:, None]) / (high - low).clamp(min=1e-12)[:, None] * BINS
    position = position.nan_to_num(0.0).clamp(0, BINS - 1).long()
    bins = logs.new_zeros(len(logs), BINS).scatter_add(1, position, here.double())
    ends = torch.stack([low, high], 1)
    ends = torch.where(ends.isfinite(), ends, torch.nan)
    return torch.cat([ends, kept.sum(1, True), (kept**2).sum(1, True), bins], 1)


def whole_trace(probe: Watched, traces: Mapping[str, float]) -> float:
    """That of all layers together, without those whose parameters others hold."""
    parameters = probe.layer_parameters
    again = set(map(shown, parameters.keys() - set(counted_once(parameters))))
    return sum(trace for name, trace in traces.items() if name not in again)
