"""Rows that are looked up in a table."""

import pytest
import torch
import torch.nn.functional as F

from secorder.layers.layout import DIM_ZERO, Layout

from .by_sample import assert_exact

IDS = torch.tensor([[0, 2, 2], [5, 1, 0], [2, 2, 2], [4, 3, 1]])


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding: int | None) -> None:
    assert_exact(lambda table: F.embedding(IDS, table, padding), torch.randn(6, 3), index=0)
    assert_exact(lambda table: F.embedding(IDS.t(), table, padding), torch.randn(6, 3), index=0, layout=Layout(1))
    flat = Layout(0, 3)
    assert_exact(lambda table: F.embedding(IDS.flatten(), table, padding), torch.randn(6, 3), index=0, layout=flat)


def test_rows_by_an_index() -> None:
    assert_exact(lambda table: table[IDS - 6], torch.randn(6, 3), index=0)
    assert_exact(lambda table: table.index_select(0, IDS.flatten()), torch.randn(6, 3), index=0, layout=Layout(0, 3))


def test_what_has_no_rule() -> None:
    def by_frequency(table: torch.Tensor) -> torch.Tensor:
        return F.embedding(IDS, table, scale_grad_by_freq=True)

    assert_exact(lambda table: table[:, IDS[:, 0]], torch.randn(6, 6), index=0, layout=Layout(1), ruled=False)
    assert_exact(by_frequency, torch.randn(6, 3), index=0, layout=DIM_ZERO, ruled=False)
