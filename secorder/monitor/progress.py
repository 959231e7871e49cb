"""A progress bar for long work, shown only where the caller asked for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    shown: bool, description: str, total: int | None, unit: str = "HVPs"
) -> Iterator[Callable[[int], None]]:
    """A function that advances a ``rich`` progress bar (with a rate and an estimate), or does nothing."""
    if not shown:
        yield lambda _: None
        return
    from .terminal import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        Text,
        TextColumn,
        TimeRemainingColumn,
    )

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} {unit}/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), Rate())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
