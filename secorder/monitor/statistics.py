"""Summaries of diagonals: moments, shares and histograms of many layers, in one device-to-host transfer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidTypeError
from ..results import Diagonals

__all__ = ["BINS", "STATISTICS", "LayerSummary", "get_layer_curvature_stats", "layer_statistics", "summarize"]

#: What is told of every diagonal. ``negative`` is the share of negative entries, ``zero`` and ``nonfinite`` likewise.
STATISTICS = ("mean", "std", "max", "min", "trace", "negative", "zero", "nonfinite")


#: Bins of a histogram.
BINS = 32


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
    """
    return {name: summary.statistics for name, summary in _summaries(layer_curvatures, histograms=False).items()}


@dataclass(frozen=True)
class LayerSummary:
    """What is told of one layer's diagonal.

    Attributes:
        statistics: :data:`STATISTICS` by name.
        low: smallest ``log10 |entry|`` of the finite, non-zero entries; nan where there are none.
        high: the largest.
        counts: their histogram in ``log10 |entry|``, equal bins from ``low`` to ``high``.
        sum: of their ``log10 |entry|``.
        sum_squares: of their squares.
    """

    statistics: dict[str, float]
    low: float
    high: float
    counts: list[float]
    sum: float
    sum_squares: float


def summarize(layer_curvatures: Mapping[str, Tensor]) -> dict[str, LayerSummary]:
    """Statistics and a histogram on a logarithmic scale of each layer's diagonal, in one transfer.

    Args:
        layer_curvatures: layer name → tensor of any shape and floating-point dtype.

    Raises:
        InvalidTypeError: as :func:`get_layer_curvature_stats`.

    Example:
        >>> import torch
        >>> from secorder.monitor.statistics import summarize
        >>> summary = summarize({"fc": torch.tensor([0.01, 1.0, -100.0, 0.0])})["fc"]
        >>> summary.low, summary.high, summary.statistics["negative"], summary.statistics["zero"]
        (-2.0, 2.0, 0.25, 0.25)
    """
    return _summaries(layer_curvatures, histograms=True)


def _summaries(layer_curvatures: Mapping[str, Tensor], *, histograms: bool) -> dict[str, LayerSummary]:
    _require_real_tensors(layer_curvatures)
    if not layer_curvatures:
        return {}
    device = next(iter(layer_curvatures.values())).device
    with torch.no_grad():
        diagonals = layer_curvatures.whole() if isinstance(layer_curvatures, Diagonals) else layer_curvatures.values()
        rows = [_numbers(d.detach().double().flatten(), histograms).to(device) for d in diagonals]
        numbers = torch.stack(rows).tolist()
    result = {}
    known = len(STATISTICS)
    for name, row in zip(layer_curvatures, numbers, strict=True):
        low, high, total, squares, *counts = row[known:] if histograms else [torch.nan] * 4
        statistics = dict(zip(STATISTICS, row[:known], strict=True))
        result[name] = LayerSummary(statistics, low, high, counts, total, squares)
    return result


def _require_real_tensors(layer_curvatures: Mapping[str, Tensor]) -> None:
    if not isinstance(layer_curvatures, Mapping):
        got = type(layer_curvatures).__name__
        raise InvalidTypeError(f"curvatures must be a mapping of layer names to tensors, got {got}.")
    for name, diagonal in layer_curvatures.items():
        if not isinstance(diagonal, Tensor) or not diagonal.is_floating_point():
            got = diagonal.dtype if isinstance(diagonal, Tensor) else type(diagonal).__name__
            raise InvalidTypeError(f"the curvature of layer {name!r} must be a tensor of real numbers, got {got}.")


def _numbers(values: Tensor, histograms: bool) -> Tensor:
    """Statistics, then low, high, sum, sum of squares and counts of the histogram; nothing is read on the host."""
    if values.numel() == 0:
        empty = values.new_full((len(STATISTICS),), torch.nan)
        return torch.cat([empty, values.new_full((4,), torch.nan), values.new_zeros(BINS)]) if histograms else empty
    std = values.std() if values.numel() > 1 else values.new_zeros(())
    shares = [(values < 0).double().mean(), (values == 0).double().mean(), (~values.isfinite()).double().mean()]
    moments = torch.stack([values.mean(), std, values.amax(), values.amin(), values.sum(), *shares])
    if not histograms:
        return moments
    logs = values.abs().log10()
    here = logs.isfinite()
    infinity = logs.new_full((), torch.inf)
    low, high = torch.where(here, logs, infinity).amin(), torch.where(here, logs, -infinity).amax()
    kept = torch.where(here, logs, 0.0)
    position = ((kept - low) / (high - low).clamp(min=1e-12) * BINS).nan_to_num(0.0).clamp(0, BINS - 1).long()
    counts = logs.new_zeros(BINS).scatter_add(0, position, here.double())
    ends = torch.stack([low, high])
    ends = torch.where(ends.isfinite(), ends, torch.nan)
    return torch.cat([moments, ends, kept.sum()[None], (kept**2).sum()[None], counts])
