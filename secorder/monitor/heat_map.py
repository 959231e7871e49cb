"""Layers over steps as a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from .blocks import blocks, shortened

__all__ = ["heat_map"]

#: Anchors of the colour scale, dark to bright, even in lightness.
_COLOURS = np.array(
    [(38, 15, 74), (74, 28, 117), (120, 36, 122), (170, 48, 106), (214, 73, 78), (244, 120, 46), (252, 180, 60),
     (252, 240, 160)], dtype=float
)  # fmt: skip

_MISSING = (120, 120, 120)

#: Layers of one panel, and panels side by side, at most: a picture is wider than high, as screens are.
_ROWS, _PANELS = 50, 4

#: Height of the map and width of the picture, which TensorBoard's page has room for.
_HEIGHT, _WIDTH = 760, 960

#: Room for the scale of colours, and the least width of a panel's map.
_SCALE, _LEAST = 104, 120


def heat_map(
    values: Sequence[Sequence[float]], names: Sequence[str], steps: Sequence[int], title: str = ""
) -> npt.NDArray[np.uint8]:
    """Layers by steps as an image, colours by ``log10`` of the absolute value, names beside the rows.

    More than fifty layers go on in a second panel to the right of the first, up to four; of more than two hundred,
    blocks are named. What all names begin with is in the title.

    Args:
        values: one row a layer, one column a step; nan, infinite and zero values are grey.
        names: of the layers.
        steps: of the columns.
        title: above the map.

    Returns:
        RGB image of shape ``(height, width, 3)``.

    Raises:
        InvalidArgumentError: there are not as many rows as names, or not as many columns as steps, or none.

    Example:
        >>> from secorder.monitor.heat_map import heat_map
        >>> image = heat_map([[1.0, 0.1], [2.0, 0.5]], ["fc1", "fc2"], [10, 20], "fisher_trace")
        >>> image.ndim, image.shape[2], image.dtype.name
        (3, 3, 'uint8')
    """
    if not names or len(values) != len(names) or any(len(row) != len(steps) for row in values) or not steps:
        raise InvalidArgumentError(
            f"values must hold a row for each of {len(names)} names, of a number for each of {len(steps)} steps; at "
            "least one each."
        )
    from PIL import Image, ImageDraw, ImageFont

    colours, low, high = _colours(values)
    told, short = shortened(["".join(c if c.isprintable() else " " for c in name) for name in names])
    panels = min(_PANELS, -(-len(names) // _ROWS))
    rows = -(-len(names) // panels)
    row = max(2, min(24, _HEIGHT // rows))
    size = max(10, min(16, row - 3))
    font, large = ImageFont.load_default(size=size), ImageFont.load_default(size=17)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = _labels(short, rows, row, size)
    margin = 16 + int(max(measure.textlength(text, font) for _, text in labels))
    width, height, top = max(_LEAST, (_WIDTH - _SCALE) // panels - margin), rows * row, 36
    columns = np.arange(width) * len(steps) // width
    image = Image.new("RGB", (panels * (margin + width) + _SCALE, top + height + 30), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), f"{title}   ({told})" if told else title, "black", large)
    for panel in range(panels):
        cells = np.repeat(colours[panel * rows : (panel + 1) * rows, columns], row, 0)
        left = (panel + 1) * margin + panel * width
        image.paste(Image.fromarray(cells), (left, top))
        draw.text((left, top + height + 6), f"step {steps[0]}", "black", large)
        draw.text((left + width, top + height + 6), f"{steps[-1]}", "black", large, anchor="ra")
    for place, text in labels:
        panel, within = divmod(place, rows)
        x = (panel + 1) * margin + panel * width - 6
        draw.text((x, top + int((within + 0.5) * row)), text, "black", font, anchor="rm")
    _scale(image, panels * (margin + width) + 12, top, height, low, high, large)
    return np.asarray(image, dtype=np.uint8)


def _colours(values: Sequence[Sequence[float]]) -> tuple[npt.NDArray[np.uint8], float, float]:
    """A colour for each value, and the logarithms of the smallest and the largest one."""
    with np.errstate(all="ignore"):
        logs = np.log10(np.abs(np.asarray(values, dtype=float)))
    finite = np.isfinite(logs)
    low, high = (logs[finite].min(), logs[finite].max()) if finite.any() else (0.0, 1.0)
    place = np.where(finite, (logs - low) / max(high - low, 1e-12), 0.0) * (len(_COLOURS) - 1)
    below = np.clip(place.astype(int), 0, len(_COLOURS) - 2)
    share = (place - below)[..., None]
    colours = _COLOURS[below] * (1 - share) + _COLOURS[below + 1] * share
    colours[~finite] = _MISSING
    return colours.astype(np.uint8), float(low), float(high)


def _labels(names: Sequence[str], rows: int, row: int, size: int) -> list[tuple[int, str]]:
    """The place of a name, counted in layers, and the name: of each layer, or of blocks where rows are too low."""
    if row >= size:
        return list(enumerate(names))
    place = {name: index for index, name in enumerate(names)}
    lines = -(-(size + 2) // row)  # rows that a name is high
    labels: list[tuple[int, str]] = []
    for title, block in blocks(names, at_most=lines).items():
        at = place[block[0]]
        if not labels or at // rows != labels[-1][0] // rows or at - labels[-1][0] >= lines:
            labels.append((at, title))
    return labels


def _scale(image: Any, x: int, y: int, height: int, low: float, high: float, font: Any) -> None:
    """The colours and what they stand for, in a strip."""
    from PIL import Image, ImageDraw

    bar = np.linspace(1, 0, height) * (len(_COLOURS) - 1)
    strip = np.stack([np.interp(bar, range(len(_COLOURS)), _COLOURS[:, c]) for c in range(3)], -1)
    image.paste(Image.fromarray(np.repeat(strip.astype(np.uint8)[:, None], 14, 1)), (x, y))
    draw = ImageDraw.Draw(image)
    draw.text((x + 18, y - 2), f"{10**high:.1e}", "black", font, anchor="la")
    if height > 40:
        draw.text((x + 18, y + height + 2), f"{10**low:.1e}", "black", font, anchor="ld")
