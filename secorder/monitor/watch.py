"""``secorder watch``: the latest numbers of a JSON lines file that still grows, and their history."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._arguments import require_number, require_path
from ..errors import InvalidArgumentError
from .fitting import fitting
from .names import WHOLE_MODEL
from .terminal import Console, ConsoleOptions, Group, Live, RenderResult, Table, Text

#: Points of the small chart beside each layer.
TREND = 24

_BLOCKS = "▁▂▃▄▅▆▇█"

#: Statistics that are shown, how they are called, and how soon they give way in a narrow terminal.
_SHOWN = {
    "fisher_trace": ("tr F", 0),
    "gradient_noise_scale": ("noise", 3),
    "hessian_trace": ("tr H", 1),
    "hessian_top_eigenvalue": ("top eig", 2),
    "learning_rate_times_eigenvalue": ("lr·eig", 2),
    "gradient_norm": ("|grad|", 4),
    "weight_norm": ("|weight|", 6),
    "update_to_weight": ("update/w", 5),
}


@dataclass(frozen=True)
class _Column:
    title: str
    cells: Mapping[str, str]
    gives_way: int


class Run:
    """What is known of a run from its file of JSON lines, which may still grow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.step: int | None = None
        self._place = self._lines = 0
        self._latest: dict[str, dict[str, float]] = {}
        self._trend: dict[str, deque[float]] = {}
        self._findings = ""

    def read(self) -> bool:
        """Read what is new; whether there was anything. A file that was begun anew is read anew."""
        size = self.path.stat().st_size
        if size < self._place:
            self._begin()
        with self.path.open("rb") as file:
            file.seek(self._place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            self._lines += 1
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                if isinstance(error, json.JSONDecodeError) and self.step is not None:
                    continue  # the part of one that a run which was cut off left
                raise InvalidArgumentError(
                    f"{self.path} holds no points of a run, as its line {self._lines} shows."
                ) from error
        return bool(whole)

    def _take(self, point: dict[str, Any]) -> None:
        self.step = int(point["step"])
        for name, value in point.items():
            statistic, _, layer = name.partition("/")
            if name == "findings":
                self._findings = value
            elif layer:
                number = math.nan if value is None else float(value)
                self._latest.setdefault(statistic, {})[layer] = number
                if statistic == "fisher_trace":
                    self._trend.setdefault(layer, deque(maxlen=TREND)).append(number)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.step is None:
            yield Text(f"{self.path} holds no point yet.", "bold")
            return
        layers = {layer: layer for name in _SHOWN for layer in self._latest.get(name, {})}
        columns = [_Column("layer", {}, 0)]
        for name, (title, gives_way) in _SHOWN.items():
            if name in self._latest:
                columns.append(_Column(title, {k: f"{v:.3g}" for k, v in self._latest[name].items()}, gives_way))
        if self._trend:
            columns.append(_Column("tr F over time", {k: _chart(v) for k, v in self._trend.items()}, 1))
        whole = self._latest.get(WHOLE_MODEL, {})
        title = "   ".join([f"step {self.step}", *(f"{name} {value:.4g}" for name, value in whole.items())])
        table = fitting(options.max_width, columns, layers, _table)
        yield Group(Text(title, "bold"), table, Text(self._findings))


def _table(columns: Sequence[_Column], names: Mapping[str, str], told: str) -> Table:
    table = Table(caption=told or None, caption_justify="left")
    for column in columns:
        chart = column.title == "tr F over time"
        table.add_column(column.title, justify="left" if chart or not column.cells else "right", no_wrap=True)
    for layer, name in names.items():
        table.add_row(Text(name), *(Text(column.cells.get(layer, "")) for column in columns[1:]))
    return table


def _chart(values: Sequence[float]) -> str:
    """Numbers as blocks, on a logarithmic scale from the smallest to the largest."""
    logs = [math.log10(x) if 0 < x < math.inf else math.nan for x in values]
    known = [x for x in logs if not math.isnan(x)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    width = max(high - low, 1e-9)
    return "".join(" " if math.isnan(x) else _BLOCKS[min(int((x - low) / width * 8), 7)] for x in logs)


def file_of(run: str) -> Path:
    """The file of a run: itself, or the newest one in a folder."""
    path = Path(run)
    if path.is_dir():
        files = sorted(path.rglob("*.jsonl"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise InvalidArgumentError(f"there is no file of JSON lines (*.jsonl) in {run}.")
        return files[-1]
    if not path.is_file():
        raise InvalidArgumentError(f"there is no run {run}: pass a file of JSON lines, or a folder that holds one.")
    return path


def watch(
    run: str, console: Console, *, once: bool = False, interval: float = 1.0, until: Callable[[], bool] = lambda: False
) -> None:
    """Show the latest numbers of a run's file, or of one in a folder, while it goes on: until the user interrupts it.

    Only ``once`` if wanted; else again after an interval in seconds, and ``until`` is asked after each whether to end.
    """
    require_path("run", run)
    require_number("interval", interval, zero=True)
    seen = Run(file_of(run))
    seen.read()
    if once:
        console.print(seen)
        return
    with Live(seen, console=console, auto_refresh=False) as live:
        while not until():
            time.sleep(interval)
            if seen.read():
                live.refresh()
