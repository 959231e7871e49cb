"""Curvature in the terminal: a table of layers."""

from collections.abc import Mapping

from rich.table import Table
from torch import Tensor

from .stats import layer_statistics

__all__ = ["layer_table"]


def layer_table(
    fisher: Mapping[str, Tensor], hessian: Mapping[str, Tensor] | None = None, *, title: str | None = None
) -> Table:
    """A ``rich`` table with one row per layer.

    Args:
        fisher: layer name → Fisher diagonal.
        hessian: layer name → Hessian diagonal, if measured.
        title: shown above the table.

    Returns:
        a renderable with the number of parameters, the Fisher's trace, its share of the whole, mean and maximum, and
        of the Hessian the trace and the share of negative entries.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for column in ("params", "tr F", "share", "mean F", "max F", *(("tr H", "H < 0") if hessian else ())):
        table.add_column(column, justify="right", no_wrap=True)
    rows, curved = layer_statistics(fisher), layer_statistics(hessian or {})
    total = sum(row["trace"] for row in rows.values()) or 1.0
    for name, row in rows.items():
        cells = [f"{fisher[name].numel():,}", f"{row['trace']:.3g}", f"{row['trace'] / total:.0%}"]
        cells += [f"{row['mean']:.2e}", f"{row['max']:.2e}"]
        if name in curved:
            cells += [f"{curved[name]['trace']:.3g}", f"{curved[name]['negative']:.0%}"]
        table.add_row(name or "model", *cells)
    return table
