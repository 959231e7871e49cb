"""A table as CSV: one row a number, whatever numbers come later."""

import csv
import io
from collections.abc import Mapping
from os import PathLike

from .lines import append_lines, file_at

__all__ = ["CSVSink"]


class CSVSink:
    """Appends rows ``step,statistic,layer,value`` to a file.

    A long table has room for what is logged on another schedule, or begins later;
    ``pandas.read_csv(path).pivot(index="step", columns=["statistic", "layer"], values="value")`` makes it wide.
    What has no layer, such as the loss, has an empty one. The file is open only while rows are written.

    Args:
        path: of the file; folders that are missing are made.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = file_at(path)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append the numbers of a step."""
        new = not self.path.exists() or self.path.stat().st_size == 0
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        if new:
            rows.writerow(("step", "statistic", "layer", "value"))
        rows.writerows((step, *name.partition("/")[::2], value) for name, value in numbers.items())
        append_lines(self.path, text.getvalue())
