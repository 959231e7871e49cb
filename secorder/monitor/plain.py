"""A table that fits, as plain text: what ``rich`` prints of it, in a fraction of the time."""

from collections.abc import Sequence
from functools import partial

from .terminal import Table, cell_len

#: Around and between the cells of a row, and what stands for a letter of them: first the head's.
_TOP, _HEAD, _BELOW_HEAD = "┏┳┓━", "┃┃┃ ", "┡╇┩━"
_ROW, _BETWEEN, _BOTTOM = "│││ ", "├┼┤─", "└┴┘─"


def plain(table: Table, width: int) -> str | None:
    """The lines of a table whose cells are one line each, with the frame and the margins that tables have by default.

    None where it does not fit, so that cells, the title or the caption would be cut or wrapped.
    """
    heads = [str(column.header) for column in table.columns]
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    widths = [max(map(cell_len, (head, *own))) for head, own in zip(heads, cells, strict=True)]
    whole = sum(widths) + 3 * len(widths) + 1
    around = [str(text) for text in (table.title or "", table.caption or "")]
    lines = [line for column in (heads, *cells, around) for line in column]
    if not widths or whole > width or max(map(cell_len, around)) > whole or any("\n" in line for line in lines):
        return None
    line = partial(_line, widths, [column.justify == "right" for column in table.columns])
    empty = [""] * len(widths)
    found = [line(empty, _TOP), line(heads, _HEAD), line(empty, _BELOW_HEAD)]
    for number, (row, texts) in enumerate(zip(table.rows, zip(*cells, strict=True), strict=True)):
        found.append(line(texts, _ROW))
        if row.end_section and number + 1 < len(table.rows):
            found.append(line(empty, _BETWEEN))
    found.append(line(empty, _BOTTOM))
    title, caption = ([text] if text else [] for text in around)
    return "\n".join(each.rstrip() for each in (*title, *found, *caption))


def _line(widths: Sequence[int], right: Sequence[bool], texts: Sequence[str], frame: str) -> str:
    """Texts in their cells, at the left or the right of them."""
    filled = []
    for text, own, at_right in zip(texts, widths, right, strict=True):
        space = frame[3] * (own - cell_len(text))
        filled.append(frame[3] + (space + text if at_right else text + space) + frame[3])
    return frame[0] + frame[1].join(filled) + frame[2]
