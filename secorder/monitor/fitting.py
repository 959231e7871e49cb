"""A table that fits the terminal's width: names are shortened, then columns are left out; numbers are never cut."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from .blocks import shortened
from .terminal import Table, cell_len


class Column(Protocol):
    """What is needed of a column."""

    @property
    def gives_way(self) -> int:
        """How soon it is left out: the largest first, 0 never."""


C = TypeVar("C", bound=Column)


def fitting(
    width: int,
    columns: Sequence[C],
    names: Mapping[str, str],
    made: Callable[[Sequence[C], Mapping[str, str], str], Table],
) -> Table:
    """The table that fits: ``made`` of columns, names, and a remark about the names, ``""`` for none.

    Names are cut in their middle where nothing else is left to give way.
    """

    table, told = made(columns, names, ""), ""
    widths = _widths(table)
    if _excess(widths, width) > 0 and names:
        told, short = shortened(list(names.values()))
        names = dict(zip(names, short, strict=True))
        table = made(columns, names, told)
        widths = _widths(table)
    kept = list(zip(columns, widths, strict=True))
    for level in sorted({column.gives_way for column in columns} - {0}, reverse=True):
        if _excess([own for _, own in kept], width) <= 0:
            break
        kept = [(column, own) for column, own in kept if column.gives_way < level]
    columns, widths = [column for column, _ in kept], [own for _, own in kept]
    excess = _excess(widths, width)
    if excess > 0 and names:
        room = max(5, max(map(cell_len, names.values())) - excess)
        names = {name: _cut(text, room) for name, text in names.items()}
    elif len(columns) == len(table.columns):
        return table
    return made(columns, names, told)


def _widths(table: Table) -> list[int]:
    """What the widest cell of each column takes."""
    return [max(cell_len(str(cell)) for cell in (column.header, *column.cells)) for column in table.columns]


def _excess(widths: Sequence[int], width: int) -> int:
    """How much a table of such columns, with their frames, is too wide."""
    return sum(widths) + 3 * len(widths) + 1 - width


def _cut(name: str, room: int) -> str:
    """A name without its middle where there is no room for it: of layers, start and end tell which one it is."""
    if cell_len(name) <= room:
        return name
    start = room // 3
    return f"{name[:start]}…{name[start + 1 - room :]}"
