"""Diagonals as numbers, histograms and pictures in any sink."""

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from torch import Tensor

from .._arguments import require_integer
from .._caution import caution
from ..results import Diagonals
from .heat_map import heat_map
from .history import History
from .names import WHOLE_MODEL, Numbers, flat, shown
from .sinks.sink import give, several, sinks_of
from .statistics import LayerSummary, summarize

__all__ = ["CurvatureLog", "log_diagonals"]

#: What is logged of a diagonal.
LOGGED = ("trace", "mean", "max")

#: Statistics that have a heat map of layers over steps.
PICTURED = ("fisher_trace", "hessian_trace")

#: What pictures are called: TensorBoard shows them small.
PICTURES = "layers over steps (click to enlarge)"

#: How much a history grows before its heat map is drawn again: a log then grows linearly with the steps.
GROWTH = 1.25


def log_diagonals(sinks: Any, diagonals: Mapping[str, Tensor], step: int, kind: str) -> None:
    """Give numbers and a histogram of every layer's diagonal to a sink.

    Numbers are ``kind_statistic/layer`` (``fisher_trace/conv1``) for the trace, the mean and the largest entry; for a
    Hessian also the share of ``negative`` entries; ``nonfinite``, the share of entries that are nan or infinite, where
    there are any; and ``model/kind_trace`` of all layers together. Histograms are of ``log10 |entry|``, as
    ``kind_histogram_log10/layer``. Everything travels to the host in one transfer.

    Args:
        sinks: a sink, or what makes one (:func:`secorder.monitor.sinks.sink.sink_of`): a ``SummaryWriter``, a path; or
            several as a list.
        diagonals: layer name → diagonal.
        step: the training step.
        kind: first part of the names: ``"fisher"``, ``"hessian"``, or a name of yours.

    Raises:
        InvalidTypeError: one of the sinks is none, or another argument has a wrong type.
        InvalidArgumentError: the step is below zero.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from secorder.monitor.log import log_diagonals
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     log_diagonals(writer, {"fc1": torch.rand(10), "fc2": torch.rand(5)}, step=0, kind="fisher")
    """
    require_integer("step", step, 0)
    with closing(CurvatureLog(sinks, strict=True)) as log:
        log.diagonals(kind, diagonals, step)


def numbers_of(kind: str, statistics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What is logged of diagonals, by statistic and layer, of :func:`~.statistics.layer_statistics`."""
    logged = (*LOGGED, "negative") if kind == "hessian" else LOGGED
    numbers = {f"{kind}_{key}": {shown(name): row[key] for name, row in statistics.items()} for key in logged}
    bad = {shown(name): row["nonfinite"] for name, row in statistics.items() if row["nonfinite"] > 0}
    return {**numbers, f"{kind}_nonfinite": bad} if bad else numbers


class CurvatureLog:
    """Sinks and the history of what they got, from which heat maps of layers over steps are drawn.

    A heat map is drawn again whenever its history has grown by a quarter. A sink that fails is warned of once, and the
    others go on.

    Args:
        sinks: as for :func:`log_diagonals`.
        strict: raise what a sink raises.

    Example:
        >>> import torch
        >>> from secorder.monitor.log import CurvatureLog
        >>> log = CurvatureLog([])
        >>> log.diagonals("fisher", {"fc1": torch.ones(10), "fc2": torch.ones(5)}, step=1)
        >>> log.history.to_dict()["model/fisher_trace"]
        [15.0]
    """

    def __init__(self, sinks: Any, *, strict: bool = False) -> None:
        self.given = sinks
        self.history = History()
        self._sinks = sinks_of(sinks)
        self._opened = [sink for sink in self._sinks if all(sink is not one for one in several(sinks))]
        self._strict = strict
        self._failed: set[tuple[int, str]] = set()
        self._drawn: dict[str, int] = {}

    def numbers(self, numbers: Numbers, step: int) -> None:
        """Give numbers to all sinks, and keep them."""
        numbers = {statistic: values for statistic, values in numbers.items() if values}
        if not numbers:
            return
        self.history.add(step, numbers)
        self._give("scalars", step, flat(numbers))
        for statistic in PICTURED:
            if statistic in numbers:
                self._picture(statistic, step)

    def histograms(self, kind: str, diagonals: Mapping[str, Tensor], step: int) -> None:
        """Give histograms of diagonals to the sinks that take them."""
        if any(hasattr(sink, "histogram") for sink in self._sinks):
            self._histograms(kind, summarize(diagonals), step)

    def _histograms(self, kind: str, summaries: Mapping[str, LayerSummary], step: int) -> None:
        """Edges and counts of each layer's histogram of ``log10 |entry|``."""
        for name, summary in summaries.items():
            if sum(summary.counts) > 0:
                bins = len(summary.counts)
                width = (summary.high - summary.low) / bins or 1e-6
                edges = [summary.low + width * i for i in range(bins)] + [max(summary.high, summary.low + 1e-6)]
                self._give("histogram", step, f"{kind}_histogram_log10/{shown(name)}", edges, summary.counts)

    def diagonals(self, kind: str, diagonals: Mapping[str, Tensor], step: int) -> None:
        """Log diagonals: see :func:`log_diagonals`."""
        summaries = summarize(diagonals)
        numbers = numbers_of(kind, {name: summary.statistics for name, summary in summaries.items()})
        again = set(map(shown, diagonals.repeated)) if isinstance(diagonals, Diagonals) else set()
        whole = {f"{kind}_trace": sum(x for name, x in numbers[f"{kind}_trace"].items() if name not in again)}
        self.numbers({**numbers, WHOLE_MODEL: whole}, step)
        self._histograms(kind, summaries, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Give a text in Markdown to the sinks that take one."""
        self._give("text", step, name, text)

    def close(self) -> None:
        """Close the sinks that were made here; what was passed as a sink is its owner's."""
        give(self._opened, "close")

    def _give(self, what: str, *arguments: Any) -> None:
        for sink in self._sinks:
            try:
                give([sink], what, *arguments)
            except Exception as error:
                if self._strict:
                    raise
                if (id(sink), what) not in self._failed:
                    self._failed.add((id(sink), what))
                    reason = f"{type(error).__name__}: {error}"
                    caution(f"{type(sink).__name__} could not be written to, and training goes on: {reason}")

    def _picture(self, statistic: str, step: int) -> None:
        seen = self.history.seen(statistic)
        if seen < 2 or seen < GROWTH * self._drawn.get(statistic, 0):
            return
        if any(hasattr(sink, "image") for sink in self._sinks):
            self._drawn[statistic] = seen
            self._give("image", step, f"{PICTURES}/{statistic}", picture(self.history, statistic))


def picture(history: History, statistic: str) -> Any:
    """The heat map of a statistic, layers over steps; see :func:`secorder.monitor.heat_map.heat_map`."""
    points = history.points(statistic)
    names = list(points[-1][1])
    values = [[row.get(name, float("nan")) for _, row in points] for name in names]
    return heat_map(values, names, [at for at, _ in points], statistic)
