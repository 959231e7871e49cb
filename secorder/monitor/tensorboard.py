"""Curvature in TensorBoard: scalars that group and sort, histograms, one chart for all layers, a heat map over time."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .heat_map import NAMED_ROWS, heat_map
from .statistics import STATISTICS, LayerSummary, summarize

__all__ = ["CurvatureLog", "Writer", "log_diagonals", "log_layout", "shown"]


class Writer(Protocol):
    """What is needed of a ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """Write one number."""

    def add_histogram_raw(
        self,
        tag: str,
        min: float,
        max: float,
        num: int,
        sum: float,
        sum_squares: float,
        bucket_limits: Sequence[float],
        bucket_counts: Sequence[float],
        global_step: int | None = None,
    ) -> None:
        """Write a histogram that is counted already."""

    def add_custom_scalars(self, layout: Mapping[str, Any]) -> None:
        """Write a layout of charts."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int | None = None, *, dataformats: str = "CHW") -> None:
        """Write an image."""

    def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> None:
        """Write text in Markdown."""


def log_diagonals(writer: Writer, diagonals: Mapping[str, Tensor], step: int, kind: str) -> None:
    """Write scalars and a histogram of every layer's diagonal.

    Scalars are ``kind/statistic/layer`` (``fisher/mean/conv1``) for mean, std, max, min and trace, so that a
    statistic's charts of all layers are in one group; for a Hessian also the share of ``negative`` entries, and
    ``nonfinite``, the share of entries that are nan or infinite, where there are any. Histograms are of
    ``log10 |entry|``, as ``kind/log10/layer``. Everything travels to the host in one transfer.

    Args:
        writer: anything with the methods of ``torch.utils.tensorboard.SummaryWriter``.
        diagonals: layer name → diagonal.
        step: the training step.
        kind: first part of the tag: ``"fisher"``, ``"hessian"``, or a name of yours.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from secorder.monitor.tensorboard import log_diagonals
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     log_diagonals(writer, {"fc1": torch.rand(10), "fc2": torch.rand(5)}, step=0, kind="fisher")
    """
    _write(writer, summarize(diagonals), step, kind)


def _write(writer: Writer, summaries: Mapping[str, LayerSummary], step: int, kind: str) -> None:
    for name, summary in summaries.items():
        for key in _statistics(kind):
            writer.add_scalar(f"{kind}/{key}/{shown(name)}", summary.statistics[key], step)
        if summary.statistics["nonfinite"] > 0:
            writer.add_scalar(f"{kind}/nonfinite/{shown(name)}", summary.statistics["nonfinite"], step)
        number = sum(summary.counts)
        if number > 0:
            width = (summary.high - summary.low) / len(summary.counts) or 1e-6
            writer.add_histogram_raw(
                f"{kind}/log10/{shown(name)}",
                min=summary.low,
                max=summary.high,
                num=int(number),
                sum=summary.sum,
                sum_squares=summary.sum_squares,
                bucket_limits=[summary.low + width * (i + 1) for i in range(len(summary.counts))],
                bucket_counts=summary.counts,
                global_step=step,
            )


def _statistics(kind: str) -> list[str]:
    names = [name for name in STATISTICS if name not in ("zero", "nonfinite")]
    return names if kind == "hessian" else [name for name in names if name != "negative"]


def shown(name: str) -> str:
    """How a layer is called in tags: the model itself has no name."""
    return name or "model"


def log_layout(writer: Writer, kinds: Sequence[str] = ("fisher", "hessian")) -> None:
    """Lay out the Custom Scalars page: one chart a statistic, with a line for every layer.

    Args:
        writer: the writer that the scalars go to.
        kinds: first parts of the tags, as :func:`log_diagonals` got them.
    """
    writer.add_custom_scalars(
        {kind: {key: ["Multiline", [f"^{kind}/{key}/.*"]] for key in _statistics(kind)} for kind in kinds}
    )


class CurvatureLog:
    """A writer with a memory: adds the layout of charts, and a heat map of layers over steps.

    The heat map is of ``log10`` of each layer's mean, redrawn whenever it has grown by a tenth, so that the log grows
    linearly with the steps.

    Args:
        writer: anything with the methods of ``torch.utils.tensorboard.SummaryWriter``.
        kinds: the curvatures that will be logged.
    """

    #: Columns that a heat map remembers; then every other one is dropped.
    COLUMNS = 512

    def __init__(self, writer: Writer, kinds: Sequence[str] = ("fisher", "hessian")) -> None:
        self.writer = writer
        self._kinds = kinds
        self._laid_out = False
        self._history: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self._stride: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._drawn: dict[str, int] = {}
        self._listed: set[str] = set()

    def log(self, kind: str, diagonals: Mapping[str, Tensor], step: int) -> None:
        """Write what :func:`log_diagonals` writes; the layout at the first call, the heat map now and then."""
        if not self._laid_out:
            log_layout(self.writer, self._kinds)
            self._laid_out = True
        summaries = summarize(diagonals)
        _write(self.writer, summaries, step, kind)
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        history = self._history.setdefault(kind, [])
        if (seen - 1) % self._stride.setdefault(kind, 1) == 0:
            history.append((step, {name: summary.statistics["mean"] for name, summary in summaries.items()}))
        if len(history) > self.COLUMNS:
            del history[1::2]
            self._stride[kind] *= 2
        if seen >= 1.1 * self._drawn.get(kind, 1) and len(history) > 1:
            self._drawn[kind] = seen
            names = list(summaries)
            values = [[means.get(name, float("nan")) for _, means in history] for name in names]
            image = heat_map(values, [shown(name) for name in names], [at for at, _ in history], f"{kind}: mean")
            self.writer.add_image(f"{kind}/layers over steps", image, step, dataformats="HWC")
            if len(names) > NAMED_ROWS and kind not in self._listed:
                self._listed.add(kind)
                rows = "\n".join(f"{row}. {shown(name)}" for row, name in enumerate(names, start=1))
                self.writer.add_text(f"{kind}/layers over steps, rows from the top", rows, step)
