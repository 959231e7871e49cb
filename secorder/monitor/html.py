"""Tables for notebooks."""

from collections.abc import Sequence
from html import escape


def html_table(
    columns: Sequence[tuple[str, bool]], rows: Sequence[tuple[str, Sequence[str]]], title: str | None = None
) -> str:
    """A table as HTML that any notebook shows, in its own colours.

    Columns are a title each, and whether it is aligned to the right; rows a kind each (``"total"`` and ``"group"`` are
    bold, ``""`` is plain) and cells.
    """
    sides = ["right" if right else "left" for _, right in columns]
    cell = "padding:2px 8px;white-space:pre"
    heads = "".join(
        f'<th style="text-align:{side};{cell}">{escape(name)}</th>'
        for (name, _), side in zip(columns, sides, strict=True)
    )
    lines = []
    for kind, cells in rows:
        style = "font-weight:bold;" if kind else ""
        style += "border-top:1px solid currentColor;" if kind == "total" else ""
        inside = "".join(
            f'<td style="text-align:{side};{cell}">{escape(text)}</td>' for text, side in zip(cells, sides, strict=True)
        )
        lines.append(f'<tr style="{style}">{inside}</tr>')
    caption = "" if title is None else f'<caption style="text-align:left">{escape(title)}</caption>'
    body = "\n".join(lines)
    return (
        f'<table style="border-collapse:collapse;font-variant-numeric:tabular-nums">{caption}'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"
    )


def html_list(lines: Sequence[str]) -> str:
    """Plain lines as a list in HTML."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
