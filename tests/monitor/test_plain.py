"""Tables as plain text, against what rich prints of them."""

import io
import unicodedata
from typing import Any

import pytest
import torch
from rich.console import Console

from secorder import report
from secorder.monitor.plain import plain
from secorder.monitor.terminal import Table

FISHER = {f"block.{i}.{name}": torch.rand(7) * 10**-i for i in range(3) for name in ("a", "層", "c")}


@pytest.mark.parametrize("width", [200, 110, 70, 45])
@pytest.mark.parametrize(
    "options",
    [{}, {"group_by": lambda name: name[-1]}, {"title": "a title"}, {"depth": 2}],
    ids=lambda options: "+".join(options),
)
def test_it_is_what_rich_prints(width: int, options: dict[str, Any]) -> None:
    table = report(FISHER, {name: -f for name, f in FISHER.items()}, **options)._fitting(width)
    console = Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    expected = "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))
    found = plain(table, width)
    assert found == expected or (found is None and width < 60)
    assert unicodedata.east_asian_width("層") == "W"  # a letter that takes two places


def test_what_would_be_cut_or_wrapped_is_left_to_rich() -> None:
    table = Table(title="a title that is longer than the table is")
    table.add_column("x")
    table.add_row("1")
    assert plain(table, 80) is None
    table.title = None
    assert plain(table, 80) is not None
    assert plain(table, 4) is None
    table.add_row("1\n2")
    assert plain(table, 80) is None
