"""TensorBoard: one group a statistic, charts of a block of layers each, histograms, pictures, texts."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

from ..._arguments import require_method
from ..blocks import blocks
from ..names import WHOLE_MODEL

__all__ = ["TensorBoardSink"]

#: From how many decades between the smallest and the largest layer on a statistic has a twin of logarithms.
DECADES = 1.0

#: Layers at most of a statistic that has one: of more, nobody reads charts, and the heat map is logarithmic.
MOST_TWINS = 256

#: What the name of a statistic's twin ends with.
TWIN = "_log10"

#: By writer, the layers of each statistic, and the statistics that have a twin.
_WRITTEN: WeakKeyDictionary[Any, tuple[dict[str, list[str]], set[str]]] = WeakKeyDictionary()


class TensorBoardSink:
    """Writes to TensorBoard.

    Scalars are ``statistic/layer`` (``fisher_trace/conv1``), so that TensorBoard shows each statistic in a group of its
    own. A statistic whose layers are further apart than a decade, which a linear axis hides, has a twin of base-10
    logarithms (``fisher_trace_log10/conv1``). On the *Custom Scalars* page each chart has the lines of one block of the
    model, twelve at most.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything that has ``add_scalar``: the other methods
            (``add_histogram_raw``, ``add_image``, ``add_text``, ``add_custom_scalars``) are used where they are there.
            Or a path of a folder, for a writer of our own.

    Example:
        >>> import tempfile
        >>> from secorder.monitor.sinks.tensorboard import TensorBoardSink
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = TensorBoardSink(folder)
        ...     sink.scalars(3, {"fisher_trace/fc1": 0.5, "fisher_trace/fc2": 50.0})
        ...     sink.close()
    """

    def __init__(self, writer: Any) -> None:
        self._owned = isinstance(writer, (str, PathLike))
        if self._owned:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(writer))
        require_method("writer", writer, "add_scalar")
        self.writer = writer
        self._layers, self._twins = _written_to(writer)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step, their twins, and the layout of charts where something is new."""
        by_statistic: dict[str, dict[str, float]] = {}
        for name, value in numbers.items():
            statistic, _, layer = name.partition("/")
            by_statistic.setdefault(statistic, {})[layer] = value
        written = dict(numbers)
        new = False
        by_statistic.pop(WHOLE_MODEL, None)  # numbers of different kinds, each with a chart of its own
        for statistic, values in by_statistic.items():
            known = self._layers.setdefault(statistic, [])
            unknown = values.keys() - set(known) if len(known) != len(values) or known != list(values) else ()
            known += [layer for layer in values if layer in unknown]
            few = len(known) <= MOST_TWINS and statistic not in self._twins
            spans = few and _decades(values.values()) >= DECADES
            if spans:
                self._twins.add(statistic)
            new = new or spans or bool(unknown)
            if statistic in self._twins:
                logs = {f"{statistic}{TWIN}/{layer}": math.log10(v) for layer, v in values.items() if 0 < v < math.inf}
                written.update(logs)
        if new and hasattr(self.writer, "add_custom_scalars"):
            self.writer.add_custom_scalars(layout(self._layers, self._twins))
        _write(self.writer, written, step)
        if self._owned:
            self.writer.flush()

    def histogram(self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]) -> None:
        """Write a histogram."""
        if not hasattr(self.writer, "add_histogram_raw"):
            return
        centres = [(low + high) / 2 for low, high in pairwise(edges)]
        self.writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=int(sum(counts)),
            sum=sum(centre * count for centre, count in zip(centres, counts, strict=True)),
            sum_squares=sum(centre**2 * count for centre, count in zip(centres, counts, strict=True)),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Write a picture."""
        if hasattr(self.writer, "add_image"):
            self.writer.add_image(name, pixels, step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text in Markdown."""
        if hasattr(self.writer, "add_text"):
            self.writer.add_text(name, text, step)

    def close(self) -> None:
        """Close a writer of our own; somebody else's stays open, with everything written."""
        if self._owned:
            self.writer.close()
        elif hasattr(self.writer, "flush"):
            self.writer.flush()


def _written_to(writer: Any) -> tuple[dict[str, list[str]], set[str]]:
    """What the layout of a writer's charts is made of, the same for all who write to it: TensorBoard shows the last."""
    try:
        return _WRITTEN.setdefault(writer, ({}, set()))
    except TypeError:  # nothing can be kept along with it
        return {}, set()


def _write(writer: Any, numbers: Mapping[str, float], step: int) -> None:
    """All numbers as one event where the writer is PyTorch's: an event each takes several times as long."""
    file: Any = getattr(writer, "file_writer", None)
    if type(file).__module__.startswith("torch.utils.tensorboard"):
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        file.add_summary(Summary(value=values), step)
        return
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)


def _decades(values: Any) -> float:
    positive = [value for value in values if 0 < value < math.inf]
    return math.log10(max(positive) / min(positive)) if len(positive) > 1 else 0.0


def layout(layers: Mapping[str, Sequence[str]], twins: Sequence[str] | set[str] = ()) -> dict[str, Any]:
    """The Custom Scalars page: a category for each statistic (its twin before it), a chart for each block of layers."""
    pages: dict[str, Any] = {}
    for statistic, names in layers.items():
        for group in ([statistic + TWIN] if statistic in twins else []) + [statistic]:
            charts = blocks(names)
            pages[group] = {
                title: ["Multiline", [f"^{re.escape(f'{group}/{name}')}$" for name in block]]
                for title, block in charts.items()
            }
    return pages
