"""The contraction with basis vectors is the contraction."""

import pytest
import torch

from secorder.layers.basis import contract_basis
from secorder.layers.contraction import contract
from secorder.layers.per_sample import Outer, Rows, with_cotangents

from .forms import SIZE, N, form


@pytest.mark.parametrize("scale", [1.0, -2.5])
@pytest.mark.parametrize("name", ["one_position", "positions", "groups", "bias"])
def test_a_basis_touches_one_row_of_the_parameter(name: str, scale: float) -> None:
    u = form(name)
    assert isinstance(u, Outer)
    basis = scale * torch.eye(u.g[0].numel()).view(-1, 1, *u.g.shape[1:])
    stacked = with_cotangents(u, lambda g: torch.randn(len(basis), *g.shape))
    expected = contract(stacked, Outer(u.a, basis.expand(-1, N, -1, -1, -1)), numel=SIZE)
    torch.testing.assert_close(contract_basis(stacked, Outer(u.a, basis), numel=SIZE), expected)


def test_what_is_no_basis_is_contracted_as_any_other() -> None:
    u = form("positions")
    assert isinstance(u, Outer)
    stacked = with_cotangents(u, lambda g: torch.randn(3, *g.shape))
    other = torch.randn(3, 1, *u.g.shape[1:])
    expected = contract(stacked, Outer(u.a, other.expand(-1, N, -1, -1, -1)), numel=SIZE)
    torch.testing.assert_close(contract_basis(stacked, Outer(u.a, other), numel=SIZE), expected)
    rows = form("rows")
    assert isinstance(rows, Rows)
    pair = with_cotangents(rows, lambda g: torch.randn(2, *g.shape))
    torch.testing.assert_close(contract_basis(pair, pair, numel=SIZE), contract(pair, numel=SIZE))
