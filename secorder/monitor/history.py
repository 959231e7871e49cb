"""What was logged, kept as a table."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .names import Numbers

if TYPE_CHECKING:
    import pandas

__all__ = ["History"]


class History:
    """The numbers of a run by statistic, step and layer, in bounded memory.

    Of each statistic as many as :attr:`at_most` points are kept; when there are more, every other one is dropped, so
    that what is left is spread evenly over the run.

    Example:
        >>> from secorder.monitor.history import History
        >>> history = History()
        >>> history.add(10, {"fisher_trace": {"fc1": 1.5, "fc2": 3.0}})
        >>> history.to_dict()
        {'step': [10], 'fisher_trace/fc1': [1.5], 'fisher_trace/fc2': [3.0]}
    """

    #: Points kept of a statistic.
    at_most = 512

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
        self._stride: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._last: tuple[int | None, dict[str, Mapping[str, float]]] = (None, {})

    def add(self, step: int, numbers: Numbers) -> None:
        """Keep the numbers of a step: statistic → layer → number."""
        if self._last[0] != step:
            self._last = (step, {})
        for statistic, values in numbers.items():
            self._last[1][statistic] = {**self._last[1].get(statistic, {}), **values}
            points = self._points.setdefault(statistic, [])
            if points and points[-1][0] == step:
                points[-1] = (step, {**points[-1][1], **values})
                continue
            seen = self._seen.get(statistic, 0)
            self._seen[statistic] = seen + 1
            if seen % self._stride.setdefault(statistic, 1) == 0:
                points.append((step, dict(values)))
            if len(points) > self.at_most:
                del points[1::2]
                self._stride[statistic] *= 2

    def __repr__(self) -> str:
        longest = max(map(len, self._points.values()), default=0)
        return f"History({longest} points of {', '.join(self._points) or 'nothing'})"

    @property
    def statistics(self) -> list[str]:
        """What was logged."""
        return list(self._points)

    def seen(self, statistic: str) -> int:
        """How many points of a statistic there were, those included that are no longer kept."""
        return self._seen.get(statistic, 0)

    def points(self, statistic: str) -> list[tuple[int, Mapping[str, float]]]:
        """Of a statistic, steps in their order and the numbers of the layers; of a step that came again, the last."""
        found: dict[int, Mapping[str, float]] = {}
        for step, values in self._points.get(statistic, ()):
            found[step] = {**found.get(step, {}), **values}
        return sorted(found.items())

    def last(self, step: int) -> Numbers:
        """What was logged at a step, if that was the last one: statistic → layer → number."""
        return self._last[1] if self._last[0] == step else {}

    def to_dict(self) -> dict[str, list[float]]:
        """The table by columns: ``"step"``, then ``"statistic/layer"``; nan where nothing was logged at a step."""
        steps = sorted({step for points in self._points.values() for step, _ in points})
        table: dict[str, list[float]] = {"step": list(steps)}
        place = {step: index for index, step in enumerate(steps)}
        for statistic, points in self._points.items():
            for step, values in points:
                for layer, value in values.items():
                    column = table.setdefault(f"{statistic}/{layer}", [math.nan] * len(steps))
                    column[place[step]] = value
        return table

    def to_pandas(self) -> "pandas.DataFrame":
        """The table as a data frame, one row a step, which is its index.

        Raises:
            ImportError: pandas is missing.
        """
        import pandas

        return pandas.DataFrame(self.to_dict()).set_index("step")

    def state_dict(self) -> dict[str, Any]:
        """What is kept, as plain Python."""
        return {"points": {name: self.points(name) for name in self._points}, "stride": self._stride.copy()} | {
            "seen": self._seen.copy()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, in place of what is kept."""
        self._points = {name: [(int(at), dict(row)) for at, row in rows] for name, rows in state["points"].items()}
        self._stride, self._seen = dict(state["stride"]), dict(state["seen"])
