"""Curvature in the terminal: a table of layers that fits the terminal, and its HTML and SVG."""

import io
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from os import PathLike
from typing import Literal, get_args

from torch import Tensor

from .._arguments import require_integer, require_one_of, require_path, shown
from ..errors import InvalidArgumentError
from ..results import Diagonals
from .fitting import fitting
from .html import html_table
from .plain import plain
from .statistics import LayerSummary, merged, rebinned, summarize
from .terminal import Console, ConsoleOptions, Measurement, RenderResult, Table, Text

_BLOCKS = " ▁▂▃▄▅▆▇█"

_SPARK_BINS = 12

#: Entries of a layer that its bar is of: what a glance can tell of millions, at a small part of the cost.
HISTOGRAM = 1 << 13

#: Name of the last row, of all layers together.
TOTAL = "total"

SortKey = Literal["name", "parameters", "trace", "mean", "std", "max", "negative"]


@dataclass(frozen=True, eq=False)
class _Row:
    """One layer: what it is, and for each curvature its summary."""

    name: str
    kind: str
    shape: str
    parameters: int
    summaries: dict[str, LayerSummary]
    measured_by: str = ""


@dataclass(frozen=True)
class _Column:
    """A column: what it shows, and how soon it gives way in a narrow terminal (0 never)."""

    title: str
    text: Callable[[_Row], str]
    gives_way: int
    right: bool = True


def report(
    fisher: Mapping[str, Tensor] | None = None,
    hessian: Mapping[str, Tensor] | None = None,
    *,
    sort_by: SortKey | None = None,
    group_by: Literal["type"] | Callable[[str], str] | None = None,
    depth: int | None = None,
    title: str | None = None,
) -> "Report":
    """A table of layers: name, type, shape, parameters, and of each curvature trace, mean, std, max, histogram.

    The last row is of all layers together, one whose parameters another holds (a tied head) left out. Where training
    measures a layer by anything but a rule for its type, a column says by what
    (:attr:`secorder.LayerInfo.measured_by`).

    Args:
        fisher: layer name → Fisher diagonal.
        hessian: layer name → Hessian diagonal; adds the share of negative entries.
        sort_by: ``"name"``, ``"parameters"``, or a statistic of the Fisher (of the Hessian where there is no Fisher),
            largest first; by default the order of the diagonals, which is the model's.
        group_by: ``"type"``, or a function from a layer's name to its group.
        depth: parts of a name at most: layers that begin alike share one row (``"encoder.layers"`` at 2).
        title: shown above the table.

    Returns:
        what ``rich.print`` shows as a table and ``print`` as plain text; see :class:`Report`.

    Raises:
        InvalidTypeError: a curvature is no mapping of layer names to tensors.
        InvalidArgumentError: neither curvature is given, ``sort_by`` or ``group_by`` is unknown, ``depth`` is below 1,
            or the two differ in a layer's size.

    Example:
        >>> import torch, secorder
        >>> print(secorder.report({"fc1": torch.rand(20), "fc2": torch.rand(5)}, sort_by="trace"))  # doctest: +SKIP
    """
    given = {"Fisher": fisher, "Hessian": hessian}
    diagonals = {kind: d for kind, d in given.items() if d is not None}
    if not diagonals:
        raise InvalidArgumentError("a report needs a Fisher or a Hessian diagonal: report(probe.fisher_diagonal()).")
    if depth is not None:
        require_integer("depth", depth, 1)
    if not (group_by is None or group_by == "type" or callable(group_by)):
        raise InvalidArgumentError(
            f'group_by must be "type", or a function of the layer\'s name, got {shown(group_by)}.'
        )
    every = _rows(diagonals)
    rows = every if depth is None else _to_depth(every, depth)
    again = {name for d in diagonals.values() if isinstance(d, Diagonals) for name in d.repeated}
    counted = [row for row in every if row.name not in again]
    return Report(rows, list(diagonals), counted=counted, sort_by=sort_by, group_by=group_by, title=title)


def _rows(diagonals: Mapping[str, Mapping[str, Tensor]]) -> list[_Row]:
    summaries = {kind: summarize(d, entries=HISTOGRAM) for kind, d in diagonals.items()}
    names = list(dict.fromkeys(name for d in diagonals.values() for name in d))
    known = [d for d in diagonals.values() if isinstance(d, Diagonals)]
    types = {name: kind for d in known for name, kind in d.layer_types.items()}
    shapes = {name: shape for d in known for name, shape in d.parameter_shapes().items()}
    measured_by = {name: info.measured_by for d in known for name, info in d.info.items() if info.measured_by}
    rows = []
    for name in names:
        shape = next(("×".join(map(str, s)) for s in shapes.get(name, {}).values()), "")
        size, *others = {d[name].numel() for d in diagonals.values() if name in d}
        if others:
            raise InvalidArgumentError(f"Fisher and Hessian of layer {name!r} differ in size: are they of one model?")
        here = {kind: rows_[name] for kind, rows_ in summaries.items() if name in rows_}
        rows.append(_Row(name, types.get(name, ""), shape, size, here, measured_by.get(name, "")))
    return rows


def _to_depth(rows: Sequence[_Row], depth: int) -> list[_Row]:
    """Rows whose names begin alike, as one."""
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(".".join(row.name.split(".")[:depth]), []).append(row)
    return [group[0] if len(group) == 1 else _together(name, group) for name, group in groups.items()]


def _together(name: str, rows: Sequence[_Row]) -> _Row:
    """Several layers as one row."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.summaries))
    summaries = {
        kind: merged([(row.parameters, row.summaries[kind]) for row in rows if kind in row.summaries]) for kind in kinds
    }
    return _Row(name, f"{len(rows)} layers", "", sum(row.parameters for row in rows), summaries)


class Report:
    """A table of layers for people: ``rich.print(report)``, ``print(report)``, a cell of a notebook, or a file.

    In a terminal that is narrow, names give up what they have in common, then columns are left out, then names are cut;
    numbers never are. ``print`` and pipes get plain text.
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        kinds: Sequence[str],
        *,
        counted: Sequence[_Row],
        sort_by: SortKey | None = None,
        group_by: Literal["type"] | Callable[[str], str] | None = None,
        title: str | None = None,
    ) -> None:
        require_one_of("sort_by", sort_by, (*get_args(SortKey), None))
        self._kinds = list(kinds)
        self._counted = counted
        self._title = title
        rows = list(rows)
        if sort_by is not None:
            rows.sort(key=lambda row: self._sort_value(row, sort_by))
        self._groups: dict[str | None, list[_Row]] = {}
        for row in rows:
            group = None if group_by is None else row.kind if group_by == "type" else group_by(row.name)
            self._groups.setdefault(group, []).append(row)

    def _sort_value(self, row: _Row, key: str) -> tuple[bool, float, str]:
        if key == "name":
            return (False, 0.0, row.name)
        statistics = row.summaries[self._kinds[0]].statistics if self._kinds[0] in row.summaries else {}
        value = float(row.parameters) if key == "parameters" else statistics.get(key, math.nan)
        return (math.isnan(value), -value, row.name)

    # ---- what is shown

    @property
    def _rows(self) -> list[_Row]:
        return [row for group in self._groups.values() for row in group]

    def _columns(self) -> list[_Column]:
        rows = self._rows
        columns = [
            _Column("layer", lambda row: row.name or "model", 0, right=False),
            _Column("type", lambda row: row.kind, 6, right=False),
            _Column("shape", lambda row: row.shape, 5),
            _Column("params", lambda row: f"{row.parameters:,}", 3),
        ]
        for kind in self._kinds:
            short = kind[0]
            traces = [abs(r.summaries[kind].statistics["trace"]) for r in rows if kind in r.summaries]
            whole = sum(t for t in traces if math.isfinite(t)) or 1.0
            columns += [
                _Column(f"tr {short}", _statistic(kind, "trace", "{:.3g}"), 0),
                _Column("share", _share(kind, whole), 2),
                _Column(f"mean {short}", _statistic(kind, "mean", "{:.2e}"), 1),
                _Column(f"std {short}", _statistic(kind, "std", "{:.2e}"), 7),
                _Column(f"max {short}", _statistic(kind, "max", "{:.2e}"), 4),
            ]
            if kind == "Hessian":
                columns.append(_Column("H < 0", _statistic(kind, "negative", "{:.0%}"), 1))
            columns.append(_Column(*_histogram(kind, rows), 3, right=False))
        if any(row.measured_by not in ("", "rule") for row in rows):
            columns.insert(4, _Column("by", lambda row: row.measured_by, 6, right=False))
        if not any(row.kind for row in rows):
            columns = [c for c in columns if c.title not in ("type", "shape")]
        return [replace(column, text=cache(column.text)) for column in columns]

    @cached_property
    def _total(self) -> _Row | None:
        """All layers as one row, parameters that a layer has from another one once; None of fewer than two."""
        return replace(_together(TOTAL, self._counted), kind="") if len(self._rows) > 1 else None

    def _table(self, columns: Sequence[_Column], names: Mapping[str, str], told: str = "") -> Table:
        """The table of these columns, with these names of the layers."""
        table = Table(title=self._title, title_justify="left", caption=told or None, caption_justify="left")
        for column in columns:
            table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)

        def cells(row: _Row, name: str) -> list[Text]:
            return [Text(name), *(Text(column.text(row)) for column in columns[1:])]

        for group, rows in self._groups.items():
            if group is not None:
                total = sum(row.parameters for row in rows)
                counts = {"layer": group, "params": f"{total:,}"}
                table.add_row(*(Text(counts.get(c.title, ""), "bold") for c in columns))
            for row in rows:
                shown = cells(row, names[row.name])
                if group is not None:
                    shown[0].pad_left(2)
                table.add_row(*shown)
            if group is not None:
                table.add_section()
        whole = self._total
        if whole is not None:
            table.add_section()
            table.add_row(*cells(whole, whole.name), style="bold")
        return table

    def _fitting(self, width: int) -> Table:
        names = {row.name: row.name or "model" for row in self._rows}
        return fitting(width, self._columns(), names, self._table)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._fitting(options.max_width)

    def __str__(self) -> str:
        width = max(30, shutil.get_terminal_size((120, 24)).columns)
        text = plain(self._fitting(width), width)
        if text is not None:
            return text
        console = Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))

    __repr__ = __str__  # what a prompt shows

    def _repr_html_(self) -> str:
        """What a notebook shows: all columns, for it can be scrolled."""
        columns = self._columns()
        rows: list[tuple[str, list[str]]] = []
        for group, layers in self._groups.items():
            if group is not None:
                rows.append(("group", [group] + [""] * (len(columns) - 1)))
            rows += [("", [column.text(row) for column in columns]) for row in layers]
        whole = self._total
        if whole is not None:
            rows.append(("total", [column.text(whole) for column in columns]))
        return html_table([(c.title, c.right) for c in columns], rows, self._title)

    # ---- files

    def save_html(self, path: str | PathLike[str], *, width: int = 140) -> None:
        """Write the table as a page of HTML."""
        require_path("path", path)
        self._recorded(width).save_html(str(path))

    def save_svg(self, path: str | PathLike[str], *, width: int = 140) -> None:
        """Write the table as a picture."""
        require_path("path", path)
        self._recorded(width).save_svg(str(path), title=self._title or "secorder")

    def _recorded(self, width: int) -> Console:
        console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
        table = self._fitting(width)
        console.width = min(width, Measurement.get(console, console.options, table).maximum)
        console.print(table)
        return console


def _statistic(kind: str, key: str, form: str) -> Callable[[_Row], str]:
    def text(row: _Row) -> str:
        return form.format(row.summaries[kind].statistics[key]) if kind in row.summaries else ""

    return text


def _share(kind: str, whole: float) -> Callable[[_Row], str]:
    def text(row: _Row) -> str:
        if kind not in row.summaries or row.name == TOTAL:  # of what may be negative, shares do not add up to 1
            return ""
        return f"{row.summaries[kind].statistics['trace'] / whole:.0%}"

    return text


def _histogram(kind: str, rows: Sequence[_Row]) -> tuple[str, Callable[[_Row], str]]:
    """A column of small histograms of ``log10 |entry|`` on a scale that all layers share, told in its title."""
    summaries = [row.summaries[kind] for row in rows if kind in row.summaries]
    known = [s for s in summaries if not math.isnan(s.low)]
    low, high = min((s.low for s in known), default=0.0), max((s.high for s in known), default=1.0)
    # The long tail of nearly zero entries would squeeze the rest.
    low = math.floor(max(low, high - _SPARK_BINS))
    high = max(math.ceil(high), low + 1)

    def text(row: _Row) -> str:
        summary = row.summaries.get(kind)
        if summary is None or math.isnan(summary.low):
            return ""
        bins = rebinned(summary, low, high, _SPARK_BINS)
        most = max(bins)
        return "".join(_BLOCKS[math.ceil(b / most * (len(_BLOCKS) - 1))] for b in bins)

    return f"1e{low:d} … 1e{high:d}", text
