"""Curvature in TensorBoard: scalars that group and sort, histograms, one chart for all layers, a heat map over time."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .stats import STATISTICS, LayerSummary, summarize

__all__ = ["CurvatureLog", "Writer", "heat_map", "log_diagonals", "log_layout"]


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
        >>> from secorder.tensorboard import log_diagonals
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     log_diagonals(writer, {"fc1": torch.rand(10), "fc2": torch.rand(5)}, step=0, kind="fisher")
    """
    _write(writer, summarize(diagonals), step, kind)


def _write(writer: Writer, summaries: Mapping[str, LayerSummary], step: int, kind: str) -> None:
    for name, summary in summaries.items():
        for key in _statistics(kind):
            writer.add_scalar(f"{kind}/{key}/{_shown(name)}", summary.statistics[key], step)
        if summary.statistics["nonfinite"] > 0:
            writer.add_scalar(f"{kind}/nonfinite/{_shown(name)}", summary.statistics["nonfinite"], step)
        number = sum(summary.counts)
        if number > 0:
            width = (summary.high - summary.low) / len(summary.counts) or 1e-6
            writer.add_histogram_raw(
                f"{kind}/log10/{_shown(name)}",
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


def _shown(name: str) -> str:
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
            image = heat_map(values, [_shown(name) for name in names], [at for at, _ in history], f"{kind}: mean")
            self.writer.add_image(f"{kind}/layers over steps", image, step, dataformats="HWC")
            if len(names) > NAMED_ROWS and kind not in self._listed:
                self._listed.add(kind)
                rows = "\n".join(f"{row}. {_shown(name)}" for row, name in enumerate(names, start=1))
                self.writer.add_text(f"{kind}/layers over steps, rows from the top", rows, step)


# --------------------------------------------------------------------------------------------------------------------
# The heat map

#: Anchors of the colour scale, dark to bright, even in lightness.
_COLOURS = np.array(
    [(38, 15, 74), (74, 28, 117), (120, 36, 122), (170, 48, 106), (214, 73, 78), (244, 120, 46), (252, 180, 60),
     (252, 240, 160)], dtype=float
)  # fmt: skip
_MISSING = (120, 120, 120)
#: Rows of a heat map that have their names beside them; more are listed in a text.
NAMED_ROWS = 64


def heat_map(
    values: Sequence[Sequence[float]], names: Sequence[str], steps: Sequence[int], title: str = ""
) -> npt.NDArray[np.uint8]:
    """Layers by steps as an image, colours by ``log10`` of the absolute value, names beside the rows.

    Args:
        values: one row a layer, one column a step; nan, infinite and zero values are grey.
        names: of the layers.
        steps: of the columns.
        title: above the map.

    Returns:
        RGB image of shape ``(height, width, 3)``.
    """
    from PIL import Image, ImageDraw, ImageFont

    with np.errstate(all="ignore"):
        logs = np.log10(np.abs(np.asarray(values, dtype=float)))
    finite = np.isfinite(logs)
    low, high = (logs[finite].min(), logs[finite].max()) if finite.any() else (0.0, 1.0)
    place = np.where(finite, (logs - low) / max(high - low, 1e-12), 0.0) * (len(_COLOURS) - 1)
    below = np.clip(place.astype(int), 0, len(_COLOURS) - 2)
    share = (place - below)[..., None]
    colours = _COLOURS[below] * (1 - share) + _COLOURS[below + 1] * share
    colours[~finite] = _MISSING

    named = len(names) <= NAMED_ROWS
    row = 20 if named else max(2, 1024 // len(names))
    wide = max(1, 360 // len(steps))
    font = ImageFont.load_default(size=14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 8 + int(max(measure.textlength(name, font) for name in names)) if named else 8
    top, bottom, right = 26, 24, 96
    cells = np.repeat(np.repeat(colours.astype(np.uint8), row, 0), wide, 1)
    height, width = cells.shape[:2]
    image = Image.new("RGB", (left + width + right, top + height + bottom), "white")
    image.paste(Image.fromarray(cells), (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((left, 4), title, "black", font)
    if named:
        for index, name in enumerate(names):
            draw.text((4, top + index * row + 1), name, "black", font)
    draw.text((left, top + height + 4), f"step {steps[0]}", "black", font)
    last = f"{steps[-1]}"
    draw.text((left + width - measure.textlength(last, font), top + height + 4), last, "black", font)
    scale = max(height, 48)
    bar = np.linspace(1, 0, scale) * (len(_COLOURS) - 1)
    strip = np.stack([np.interp(bar, range(len(_COLOURS)), _COLOURS[:, c]) for c in range(3)], -1)
    image.paste(Image.fromarray(np.repeat(strip.astype(np.uint8)[:height, None], 12, 1)), (left + width + 10, top))
    draw.text((left + width + 26, top - 2), f"{10**high:.1e}", "black", font)
    draw.text((left + width + 26, top + height - 16), f"{10**low:.1e}", "black", font)
    return np.asarray(image, dtype=np.uint8)
