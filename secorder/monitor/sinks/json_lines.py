"""JSON lines: one object a point, which any tool can read and ``secorder watch`` shows live."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from .lines import append_lines, file_at

__all__ = ["JSONLinesSink"]


class JSONLinesSink:
    """Appends a line to a file for each point.

    A line is ``{"step": 10, "time": 1767225600.0, "fisher_trace/conv1": 0.5, …}``; JSON has no number that is not
    finite: nan is null, and infinite numbers are ``±1e999``, which readers round to infinity. The file is open only
    while a line is written.

    Args:
        path: of the file; folders that are missing are made.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from secorder.monitor.sinks.json_lines import JSONLinesSink, points
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     JSONLinesSink(Path(folder, "run.jsonl")).scalars(3, {"loss": 0.5})
        ...     next(points(Path(folder, "run.jsonl")))["loss"]
        0.5
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = file_at(path)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append the numbers of a step."""
        self._append(step, numbers)

    def text(self, step: int, name: str, text: str) -> None:
        """Append a text, under its name."""
        self._append(step, {name: text})

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        point = {"step": step, "time": round(time.time(), 3), **values}
        try:
            line = json.dumps(point, allow_nan=False)
        except ValueError:
            marked = {name: _marked(value) for name, value in point.items()}
            line = json.dumps(marked, allow_nan=False)
            line = line.replace('"+infinite+"', "1e999").replace('"-infinite-"', "-1e999")
        append_lines(self.path, line + "\n")


def _marked(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else "+infinite+" if value > 0 else "-infinite-"


def points(path: str | PathLike[str]) -> Iterator[dict[str, Any]]:
    """The points of a file of JSON lines, null as nan; without the parts of lines that runs which were cut off left."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                read = json.loads(line)
                yield {name: math.nan if value is None else value for name, value in read.items()}
