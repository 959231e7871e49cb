"""Layers over steps as a picture."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["NAMED_ROWS", "heat_map"]

#: Anchors of the colour scale, dark to bright, even in lightness.
_COLOURS = np.array(
    [(38, 15, 74), (74, 28, 117), (120, 36, 122), (170, 48, 106), (214, 73, 78), (244, 120, 46), (252, 180, 60),
     (252, 240, 160)], dtype=float
)  # fmt: skip


_MISSING = (120, 120, 120)


#: Rows of a heat map that have their names beside them; more are listed in a text.
NAMED_ROWS = 64


def heat_map(
    values: Sequence[Sequence[float]], names: Sequence[str], steps: Sequence[int], title: str = ""
) -> npt.NDArray[np.uint8]:
    """Layers by steps as an image, colours by ``log10`` of the absolute value, names beside the rows.

    Args:
        values: one row a layer, one column a step; nan, infinite and zero values are grey.
        names: of the layers.
        steps: of the columns.
        title: above the map.

    Returns:
        RGB image of shape ``(height, width, 3)``.
    """
    from PIL import Image, ImageDraw, ImageFont

    with np.errstate(all="ignore"):
        logs = np.log10(np.abs(np.asarray(values, dtype=float)))
    finite = np.isfinite(logs)
    low, high = (logs[finite].min(), logs[finite].max()) if finite.any() else (0.0, 1.0)
    place = np.where(finite, (logs - low) / max(high - low, 1e-12), 0.0) * (len(_COLOURS) - 1)
    below = np.clip(place.astype(int), 0, len(_COLOURS) - 2)
    share = (place - below)[..., None]
    colours = _COLOURS[below] * (1 - share) + _COLOURS[below + 1] * share
    colours[~finite] = _MISSING

    named = len(names) <= NAMED_ROWS
    row = 20 if named else max(2, 1024 // len(names))
    wide = max(1, 360 // len(steps))
    font = ImageFont.load_default(size=14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 8 + int(max(measure.textlength(name, font) for name in names)) if named else 8
    top, bottom, right = 26, 24, 96
    cells = np.repeat(np.repeat(colours.astype(np.uint8), row, 0), wide, 1)
    height, width = cells.shape[:2]
    image = Image.new("RGB", (left + width + right, top + height + bottom), "white")
    image.paste(Image.fromarray(cells), (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((left, 4), title, "black", font)
    if named:
        for index, name in enumerate(names):
            draw.text((4, top + index * row + 1), name, "black", font)
    draw.text((left, top + height + 4), f"step {steps[0]}", "black", font)
    last = f"{steps[-1]}"
    draw.text((left + width - measure.textlength(last, font), top + height + 4), last, "black", font)
    scale = max(height, 48)
    bar = np.linspace(1, 0, scale) * (len(_COLOURS) - 1)
    strip = np.stack([np.interp(bar, range(len(_COLOURS)), _COLOURS[:, c]) for c in range(3)], -1)
    image.paste(Image.fromarray(np.repeat(strip.astype(np.uint8)[:height, None], 12, 1)), (left + width + 10, top))
    draw.text((left + width + 26, top - 2), f"{10**high:.1e}", "black", font)
    draw.text((left + width + 26, top + height - 16), f"{10**low:.1e}", "black", font)
    return np.asarray(image, dtype=np.uint8)
