"""Layers over steps as a picture."""

import numpy as np

from secorder.monitor.heat_map import NAMED_ROWS, heat_map


def test_heat_map() -> None:
    image = heat_map([[1.0, 10.0, 100.0], [float("nan"), 0.0, 1e-3]], ["first", "second"], [0, 10, 20], "fisher")
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert (image == 120).all(-1).any()  # nan and zero are grey
    many = heat_map([[1.0, 2.0]] * 1000, [str(i) for i in range(1000)], [0, 1])
    assert many.shape[0] < 2200


def test_colours_go_by_the_logarithm() -> None:
    """Values a decade apart are equally far apart, whatever their sign."""
    names = [str(i) for i in range(NAMED_ROWS + 1)]  # without names, the first cell is at a place that is known
    values = [[10.0**-2, -(10.0**0), 10.0**2]] * len(names)
    image = heat_map(values, names, [0, 1, 2]).astype(int)
    wide = 360 // 3
    first, middle, last = (image[30, 8 + wide * column + wide // 2] for column in range(3))
    assert first.tolist() == [38, 15, 74]
    assert last.tolist() == [252, 240, 160]
    assert middle.tolist() == [192, 60, 92]  # half-way between the two anchors in the middle of the scale
    assert (image[30, 8 : 8 + wide] == first).all()
