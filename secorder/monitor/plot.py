"""A run as a matplotlib figure: all layers as a heat map over steps, the largest as lines."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import require_integer, shown
from ..errors import InvalidArgumentError, InvalidTypeError
from .blocks import shortened
from .history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot"]


def plot(history: History, statistic: str = "fisher_trace", *, top: int = 10) -> "Figure":
    """Heat map of a statistic, and lines of the layers where it is largest at the end.

    Both are on a logarithmic scale where all values are positive. The figure belongs to no window and to no ``pyplot``:
    save it by ``figure.savefig("run.png")``; notebooks show it.

    Args:
        history: of a recorder.
        statistic: one of ``history.statistics``.
        top: how many layers have lines.

    Raises:
        ImportError: matplotlib is missing.
        InvalidTypeError: ``history`` is none.
        InvalidArgumentError: nothing was logged of it.

    Example:
        >>> from secorder.monitor.history import History
        >>> from secorder.monitor.plot import plot
        >>> history = History()
        >>> for step in (1, 2):
        ...     history.add(step, {"fisher_trace": {"fc1": step, "fc2": 10.0 * step}})
        >>> plot(history).savefig("run.png")  # doctest: +SKIP
    """
    if not isinstance(history, History):
        raise InvalidTypeError(f"history must be a History, such as recorder.history, got {shown(history)}.")
    require_integer("top", top, 0)
    points = history.points(statistic)
    if not points:
        known = ", ".join(history.statistics) or "nothing yet"
        raise InvalidArgumentError(f"nothing was logged of {statistic!r}: there is {known}.")
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, row in points for name in row))
    steps = [step for step, _ in points]
    values = np.array([[row.get(name, math.nan) for _, row in points] for name in names], dtype=float)
    finite = values[np.isfinite(values)]
    logarithmic = bool(finite.size and (finite > 0).all())
    told, short = shortened(names)

    height = min(16.0, 1.5 + 0.22 * len(names))
    figure = Figure(figsize=(12, max(4.0, height)), layout="constrained")
    figure.suptitle(f"{statistic}   ({told})" if told else statistic)
    heat, lines = figure.subplots(1, 2)
    edges = _edges(steps)
    norm = LogNorm() if logarithmic else None
    mesh = heat.pcolormesh(edges, np.arange(len(names) + 1), values, cmap="inferno", norm=norm)
    heat.invert_yaxis()
    every = max(1, math.ceil(len(names) / 75))
    heat.set_yticks(np.arange(len(names))[::every] + 0.5, short[::every], fontsize=8 if len(names) <= 40 else 6)
    heat.set_xlabel("step")
    figure.colorbar(mesh, ax=heat)
    _lines(lines, steps, values, short, top)
    if logarithmic:
        lines.set_yscale("log")
    return figure


def _edges(steps: list[int]) -> Any:
    """Borders of the columns: half-way between neighbouring steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (np.array(steps[1:]) + np.array(steps[:-1])) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _lines(axes: Any, steps: list[int], values: Any, names: list[str], top: int) -> None:
    """Lines of the layers that are largest in modulus at the end."""
    last = np.nan_to_num(np.abs(values[:, -1]), nan=-1.0, posinf=np.inf)
    for index in np.argsort(-last, kind="stable")[:top]:
        axes.plot(steps, values[index], label=names[index], marker="." if len(steps) < 30 else None)
    axes.set_xlabel("step")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
