"""Alternating contestants, medians, and a table of ratios."""

import math
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def alternate(contestants: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each contestant, all of them run in turn ``repeats`` times after some rounds of warming up.

    In an order that is drawn for each round: who always ran after the one that leaves no cache warm would be at a loss.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + warm_up):
        for name in order.sample(list(contestants), len(contestants)):
            seconds = timed(contestants[name])
            if turn >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(work: Callable[[], object]) -> float:
    """Seconds that work takes: on the default device, as its own events tell where that is CUDA."""
    if torch.get_default_device().type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x, by least squares."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mu, mv = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mu) * (b - mv) for a, b in zip(u, v, strict=True)) / sum((a - mu) ** 2 for a in u)


class Results:
    """Prints tables and keeps their numbers."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tables: list[dict[str, Any]] = []

    def show(
        self,
        work: str,
        workload: str,
        times: dict[str, float],
        errors: dict[str, float] | None = None,
        refused: dict[str, str] | None = None,
    ) -> None:
        """Print medians, their ratio to the first contestant, relative errors, and who did not take part."""
        table = Table(title=f"{work}: {workload}", title_justify="left")
        for column in ("contestant", "median", "ratio", "rel. error"):
            table.add_column(column, justify="left" if column == "contestant" else "right")
        first = next(iter(times.values()), 1.0)
        rows = []
        for name, seconds in times.items():
            error = (errors or {}).get(name)
            shown = "" if error is None else f"{error:.1e}"
            table.add_row(name, f"{seconds * 1e3:.1f} ms", f"{seconds / first:.2f}×", shown)
            rows.append({"contestant": name, "seconds": seconds, "ratio": seconds / first, "relative_error": error})
        for name, reason in (refused or {}).items():
            table.add_row(name, "—", "—", reason[:48])
            rows.append({"contestant": name, "refused": reason})
        self.console.print(table)
        self.tables.append({"work": work, "workload": workload, "rows": rows})

    def markdown(self) -> str:
        """A table for each work: of a row, one workload, the first contestant's time, and the others' ratios to it."""
        parts = []
        for work in dict.fromkeys(table["work"] for table in self.tables):
            tables = [table for table in self.tables if table["work"] == work]
            names = list(dict.fromkeys(_contestant(row) for table in tables for row in table["rows"]))
            lines = [f"**{work}**", "", f"| workload | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
            for table in tables:
                rows = {_contestant(row): row for row in table["rows"]}
                first = next(iter(rows))
                cells = [_cell(rows.get(name), first=name == first) for name in names]
                lines.append(f"| {table['workload']} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
        return "\n\n".join(parts)


def _contestant(row: Mapping[str, Any]) -> str:
    """Its name, without how many draws it had time for."""
    return re.sub(r", \d+( draws)?$", "", str(row["contestant"]))


def _cell(row: Mapping[str, Any] | None, *, first: bool) -> str:
    if row is None:
        return ""
    if "refused" in row:
        return "refuses"
    seconds, error = row["seconds"], row["relative_error"]
    absolute = f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.0f} s"
    shown = absolute if first else f"{row['ratio']:.2f}×"
    return shown if error is None else f"{shown} ({error:.0e})"
