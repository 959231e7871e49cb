"""A relation of shapes is used where it explains the shape of now, and nowhere else."""

import pytest

from secorder.layers.layout import Layout
from secorder.online.samples.relation import Verified, explain, whole_call

ROWS = Verified(Layout(0, 3, True), 0, (18, 4), ((6, 3, 4),), 6)
MAJOR = Verified(Layout(0, 3, False), 0, (18, 4), ((6, 3, 4),), 6)
COLUMN = Verified(Layout(1), 0, (3, 6, 4), ((6, 3, 4),), 6)


@pytest.mark.parametrize(
    ("seen", "shape", "arguments", "count", "expected"),
    [
        (ROWS, (18, 4), ((6, 3, 4),), 6, Layout(0, 3, True)),  # as it was
        (ROWS, (12, 4), ((4, 3, 4),), 4, Layout(0, 3, True)),  # another number of samples
        (ROWS, (30, 4), ((6, 5, 4),), 6, Layout(0, 5, True)),  # longer sequences
        (ROWS, (12, 4), ((6, 3, 4),), 6, None),  # as many samples, other rows: they depend on data
        (ROWS, (12, 4), ((6, 5, 4),), 6, None),  # two rows a sample, and nothing has the size two
        (MAJOR, (30, 4), ((6, 5, 4),), 6, Layout(0, 5, False)),
        (MAJOR, (6, 4), ((6, 1, 4),), 6, Layout(0)),  # of one position, rows are those of samples in either order
        (COLUMN, (3, 4, 4), ((4, 3, 4),), 4, Layout(1)),
        (COLUMN, (3, 5, 4), ((4, 3, 4),), 4, None),
        (COLUMN, (12, 4), ((4, 3, 4),), 4, None),
    ],
)
def test_what_is_explained(
    seen: Verified, shape: tuple[int, ...], arguments: tuple, count: int, expected: object
) -> None:
    assert explain([seen], 0, shape, arguments, count) == expected


def test_forwards_of_other_operations_that_explain_a_shape_in_different_ways() -> None:
    """Which of them this one is like is not told by shapes, also where one of them had the very same."""
    row, column = Verified(Layout(), 0, (3, 3, 4), ((3, 3, 4),), 3), COLUMN
    assert explain([row, column], 0, (3, 3, 4), ((3, 3, 4),), 3) is None
    assert explain([row, column], 0, (3, 5, 4), ((5, 3, 4),), 5) == Layout(1)
    assert explain([row, column._replace(place=1)], 0, (3, 3, 4), ((3, 3, 4),), 3) == Layout()
    assert explain([row, ROWS], 0, (9, 4), ((3, 3, 4),), 3) is None  # with these arguments there were other rows


def test_all_of_a_call_belongs_to_the_only_sample() -> None:
    assert explain([], 0, (7, 4), ((1, 7, 4),), 1) == whole_call((7, 4)) == Layout(0, 7)
    assert whole_call(()) is None
