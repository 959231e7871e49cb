"""Layers over steps as a picture."""

import numpy as np
import pytest

from secorder import InvalidArgumentError
from secorder.monitor.heat_map import heat_map


def test_heat_map() -> None:
    image = heat_map([[1.0, 10.0, 100.0], [float("nan"), 0.0, 1e-3]], ["first", "second"], [0, 10, 20], "fisher")
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert (image == 120).all(-1).any()  # nan and zero are grey


@pytest.mark.parametrize("layers", [1, 12, 75, 200, 1000])
def test_it_fits_a_screen(layers: int) -> None:
    """Wider than high, and no wider than a page, with names of layers or of blocks."""
    names = [f"model.decoder.layers.{i // 4}.{('q', 'k', 'v', 'out')[i % 4]}" for i in range(layers)]
    image = heat_map([[1.0 + i, 2.0 + i] for i in range(layers)], names, [0, 1])
    assert image.shape[0] < 850
    assert 900 < image.shape[1] < 1100


def test_colours_go_by_the_logarithm() -> None:
    """Values a decade apart are equally far apart, whatever their sign."""
    image = heat_map([[10.0**-2, -(10.0**0), 10.0**2]], ["layer"], [0, 1, 2]).astype(int)
    row = image[48]  # through the middle of the only layer
    expected = ([38, 15, 74], [192, 60, 92], [252, 240, 160])  # the ends, and the middle of the scale
    places = [np.flatnonzero((row == colour).all(1)) for colour in expected]
    widths = [len(place) for place in places]
    assert min(widths) > 200
    assert max(widths) - min(widths) <= 20  # the strip beside the map has the colours too
    assert places[0][0] < places[1][0] < places[2][0]


@pytest.mark.parametrize(
    ("values", "names", "steps"), [([], [], []), ([[1.0]], ["a", "b"], [1]), ([[1.0, 2.0], [1.0]], ["a", "b"], [1, 2])]
)
def test_what_no_map_can_be_drawn_of(values: list[list[float]], names: list[str], steps: list[int]) -> None:
    with pytest.raises(InvalidArgumentError, match="a row for each of"):
        heat_map(values, names, steps)
