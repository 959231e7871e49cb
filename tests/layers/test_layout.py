"""Where samples are, by shape."""

import pytest
import torch

from secorder.layers.layout import DIM_ZERO, Layout, candidate_layouts, layouts_of

N, T = 4, 3


@pytest.mark.parametrize("layout", [Layout(), Layout(1), Layout(0, T, True), Layout(0, T, False)], ids=str)
def test_split_tells_sample_and_row_of_each_entry(layout: Layout) -> None:
    shape = {1: (T, N, 2)}.get(layout.dim, (N * layout.rows, 2))
    tensor = torch.randn(shape)
    split = layout.split(tensor)
    assert layout.size(tensor) == len(split) == N
    for n in range(N):
        if layout.dim == 1:
            expected = tensor[:, n]
        elif layout.rows == 1:
            expected = tensor[n]
        elif layout.sample_major:
            expected = tensor[n * T : (n + 1) * T]
        else:
            expected = tensor[n::N]
        assert torch.equal(split[n], expected)
    assert torch.equal(layout.join(split), tensor)


@pytest.mark.parametrize(
    ("inputs", "output", "any_leading_dim", "expected"),
    [
        ([(N, 5)], (N, 2), False, [DIM_ZERO]),
        ([(N * T, 5)], (N * T, 2), False, [Layout(0, T, True), Layout(0, T, False)]),
        ([(T, N, 5)], (T, N, 2), True, [Layout(1)]),
        ([(T, N, 5)], (T, N, 2), False, []),
        ([(N, N, 5)], (N, N, 2), True, [DIM_ZERO, Layout(1)]),
        ([(5, 5)], (5, 2), True, []),  # five rows are no number of rows for four samples
        ([(N, 5), (1, 5)], (N, 2), True, []),  # an input that all samples share
        ([(N, 5)], (), True, []),
    ],
    ids=str,
)
def test_candidates(
    inputs: list[tuple[int, ...]], output: tuple[int, ...], any_leading_dim: bool, expected: list[Layout]
) -> None:
    tensors = tuple(torch.zeros(shape) for shape in inputs)
    assert candidate_layouts(tensors, torch.zeros(output), N, any_leading_dim=any_leading_dim) == expected


def test_layouts_by_shape_alone() -> None:
    assert layouts_of((4, 8, 3), 4) == [Layout(0), Layout(1, 2), Layout(1, 2, False)]
    assert layouts_of((8, 4), 4, any_dim=False) == [Layout(1), Layout(0, 2), Layout(0, 2, False)]
    assert layouts_of((4, 8), 4, any_dim=False) == [DIM_ZERO]
    assert layouts_of((0, 3), 0) == [DIM_ZERO]
