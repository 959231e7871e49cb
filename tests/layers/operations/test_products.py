"""Products of matrices."""

import pytest
import torch

from secorder.layers.layout import DIM_ZERO, Layout

from .by_sample import assert_exact

LAYOUTS = [(4, DIM_ZERO), (12, Layout(0, 3)), (12, Layout(0, 3, False))]


@pytest.mark.parametrize(("rows", "layout"), LAYOUTS, ids=str)
def test_product_of_samples_and_a_matrix(rows: int, layout: Layout) -> None:
    x, w, b = torch.randn(rows, 3), torch.randn(3, 5), torch.randn(5)
    assert_exact(torch.mm, x, w, layout=layout)
    assert_exact(torch.addmm, b, x, w, layout=layout, index=2)
    assert_exact(torch.addmm, b, x, w, layout=layout, index=0)
    assert_exact(lambda *t: torch.addmm(*t, beta=0.5, alpha=2.0), b, x, w, layout=layout, index=2)
    assert_exact(lambda *t: torch.addmm(*t, beta=0.5, alpha=2.0), b, x, w, layout=layout, index=0)


def test_a_matrix_on_the_left_of_samples_in_columns() -> None:
    assert_exact(torch.mm, torch.randn(5, 3), torch.randn(3, 4), layout=Layout(1), index=0)
    assert_exact(torch.mm, torch.randn(5, 3), torch.randn(3, 12), layout=Layout(1, 3), index=0, ruled=False)


@pytest.mark.parametrize("layout", [Layout(1), Layout(1, 2), Layout(1, 2, False)], ids=str)
def test_matrices_of_experts(layout: Layout) -> None:
    assert_exact(torch.bmm, torch.randn(2, 4, 3), torch.randn(2, 3, 5), layout=layout)


def test_matrices_of_samples_have_no_rule() -> None:
    assert_exact(torch.bmm, torch.randn(4, 2, 3), torch.randn(4, 3, 5), ruled=False)
