"""A table that fits a terminal: names give up what they share, then columns are left out; numbers are never cut."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from .blocks import shortened
from .terminal import Console, Measurement, Table

__all__ = ["fitting"]


class Column(Protocol):
    """What is needed of a column."""

    @property
    def gives_way(self) -> int:
        """How soon it is left out: the largest first, 0 never."""


C = TypeVar("C", bound=Column)


def fitting(
    console: Console,
    width: int,
    columns: Sequence[C],
    names: Mapping[str, str],
    made: Callable[[Sequence[C], Mapping[str, str], str], Table],
) -> Table:
    """The table that fits.

    Args:
        console: where it will be shown.
        width: of what it must fit, in letters.
        columns: of the table.
        names: layer → how it is called in the first column.
        made: makes the table of columns, names, and a remark about the names, ``""`` for none.

    Returns:
        a table; names are cut at their start where nothing else is left to give way.
    """

    def excess(table: Table) -> int:
        return Measurement.get(console, console.options.update(width=10_000), table).maximum - width

    table, told = made(columns, names, ""), ""
    if excess(table) > 0 and names:
        told, short = shortened(list(names.values()))
        names = dict(zip(names, short, strict=True))
        table = made(columns, names, told)
    for level in sorted({column.gives_way for column in columns} - {0}, reverse=True):
        if excess(table) <= 0:
            return table
        columns = [column for column in columns if column.gives_way < level]
        table = made(columns, names, told)
    if excess(table) > 0 and names:
        room = max(5, max(map(len, names.values())) - excess(table))
        cut = {name: text if len(text) <= room else f"…{text[1 - room :]}" for name, text in names.items()}
        table = made(columns, cut, told)
    return table
