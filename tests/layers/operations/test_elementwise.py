"""Operations that go element by element."""

import pytest
import torch

from secorder.layers.layout import DIM_ZERO, Layout

from .by_sample import assert_exact

SHAPES = [
    ((4, 3, 5), (5,), DIM_ZERO),
    ((4, 3, 5), (3, 5), DIM_ZERO),
    ((4, 3, 5), (1, 3, 1), DIM_ZERO),
    ((4, 3, 5), (), DIM_ZERO),
    ((3, 4, 5), (3, 1, 5), Layout(1)),
    ((12, 5), (5,), Layout(0, 3)),
    ((12, 5), (1, 5), Layout(0, 3, False)),
]


@pytest.mark.parametrize(("shape", "own", "layout"), SHAPES, ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_a_parameter_that_is_broadcast_to_the_samples(
    shape: tuple[int, ...], own: tuple[int, ...], layout: Layout, index: int
) -> None:
    pair = (torch.randn(own), torch.randn(shape)) if index == 0 else (torch.randn(shape), torch.randn(own))
    assert_exact(torch.add, *pair, layout=layout, index=index)
    assert_exact(lambda a, b: torch.sub(a, b, alpha=0.5), *pair, layout=layout, index=index)
    assert_exact(torch.mul, *pair, layout=layout, index=index)
    assert_exact(torch.div, *pair, layout=layout, index=index, ruled=index == 0)


def test_one_token_for_all_samples() -> None:
    assert_exact(lambda token: token.expand(4, -1, -1), torch.randn(1, 2, 3), index=0)


def test_a_row_a_sample_is_left_to_the_operation_itself() -> None:
    assert_exact(torch.mul, torch.randn(4, 3), torch.randn(4, 3), ruled=False)
    assert_exact(torch.add, torch.randn(4, 3), torch.randn(4, 1), layout=Layout(0, 2), ruled=False)
