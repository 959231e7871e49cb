"""A table that fits."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secorder.monitor.fitting import fitting
from secorder.monitor.terminal import Console, Measurement, Table


@dataclass(frozen=True)
class Column:
    title: str
    gives_way: int


def test_what_gives_way_first() -> None:
    names = {f"model.layers.{i}.linear": f"model.layers.{i}.linear" for i in range(3)}
    columns = [Column("name", 0), Column("first", 2), Column("second", 1), Column("always, longer", 0)]
    seen: list[tuple[list[str], str, str]] = []

    def made(columns: Sequence[Column], names: Mapping[str, str], told: str) -> Table:
        table = Table()
        for column in columns:
            table.add_column(column.title, no_wrap=True)
        for name in names.values():
            table.add_row(name, *["1234567890"] * (len(columns) - 1))
        seen.append(([column.title for column in columns], next(iter(names.values())), told))
        return table

    console = Console(file=io.StringIO())
    results = {}
    for width in (100, 62, 47, 29):
        table = fitting(width, columns, names, made)
        assert Measurement.get(console, console.options.update(width=200), table).maximum <= width
        results[width] = seen[-1]
    whole = ["name", "first", "second", "always, longer"]
    assert results[100] == (whole, "model.layers.0.linear", "")
    assert results[62] == (whole, "0.linear", "names without model.layers.")
    assert results[47] == (["name", "second", "always, longer"], "0.linear", "names without model.layers.")
    assert results[29] == (["name", "always, longer"], "0.linear", "names without model.layers.")
    fitting(27, columns, names, made)
    assert seen[-1][1] == "0.…ear"
