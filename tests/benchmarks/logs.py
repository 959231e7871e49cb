"""``python -m tests.benchmarks.logs``: how TensorBoard logging grows with layers and steps.

Prints tags, bytes and time a step for grids of layers and steps, and the exponents of their growth: one is linear.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from secorder.monitor.log import CurvatureLog

from .timing import exponent


def measure(layers: int, steps: int) -> tuple[int, int, float]:
    """Tags, bytes and seconds of one run."""
    torch.manual_seed(0)
    diagonals = {f"layer{i}": torch.rand(64) ** 4 for i in range(layers)}
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            log = CurvatureLog(writer)
            start = time.perf_counter()
            for step in range(steps):
                log.diagonals("fisher", diagonals, step)
            seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        events = EventAccumulator(folder, size_guidance={"scalars": 1, "images": 1, "histograms": 1})
        events.Reload()
        tags = sum(len(names) for names in events.Tags().values() if isinstance(names, list))
    return tags, size, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Growth of TensorBoard logging.")
    parser.add_argument("--steps", type=int, default=2000, help="of the longest run; 100000 takes two minutes")
    parser.add_argument("--layers", type=int, default=1000, help="of the widest run")
    options = parser.parse_args()
    by_steps = [(1, max(2, options.steps // k)) for k in (4, 2, 1)]
    by_layers = [(max(1, options.layers // k), 20) for k in (4, 2, 1)]
    table = Table(title="Logging a Fisher diagonal: scalars, histograms, heat map", title_justify="left")
    for column in ("layers", "steps", "tags", "size", "a step"):
        table.add_column(column, justify="right")
    found = {}
    for layers, steps in (*by_steps, *by_layers):
        tags, size, seconds = found[layers, steps] = measure(layers, steps)
        table.add_row(
            f"{layers:,}", f"{steps:,}", f"{tags:,}", f"{size / 1e6:.1f} MB", f"{seconds / steps * 1e3:.2f} ms"
        )
    console = Console()
    console.print(table)
    for name, runs, axis in (("steps", by_steps, 1), ("layers", by_layers, 0)):
        sizes = [run[axis] for run in runs]
        console.print(
            f"growth in {name}: size ^{exponent(sizes, [found[run][1] for run in runs]):.2f}, "
            f"time ^{exponent(sizes, [found[run][2] for run in runs]):.2f}"
        )


if __name__ == "__main__":
    main()
