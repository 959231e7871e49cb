"""Roots as maps: all columns, some of them, mixtures, draws, and several roots joined."""

import pytest
import torch
from torch import Tensor

from secorder.oneshot.roots import Columns, Draws, Pairs, Root, Single, from_hessian, joined

from ..helpers import seeded

N, C = 4, 3


def hessian_of(pairs: Pairs) -> Tensor:
    v = pairs.u if pairs.v is None else pairs.v
    return torch.einsum(
        "kni,knj,kn->nij", pairs.u, v, torch.ones(pairs.u.shape[:2]) if pairs.sign is None else pairs.sign
    )


def whole(root: Columns) -> Tensor:
    return hessian_of(root.columns(range(root.num_columns)))


def symmetric(size: int = C) -> Tensor:
    h = torch.randn(N, size, size)
    return h + h.mT


def signed(size: int = C) -> tuple[Root, Tensor]:
    """A root with signs, and what it is the root of."""
    u, sign = torch.randn(N, size, size), torch.randint(0, 2, (N, size)) * 2.0 - 1
    h = torch.einsum("nki,nkj,nk->nij", u, u, sign)
    return Root(lambda xi: torch.einsum("mnk,nki->mni", xi.expand(-1, N, -1), u), size, u[:, 0], None, sign), h


def test_roots_of_a_hessian_and_of_one_vector() -> None:
    h, u = symmetric(), torch.randn(N, C)
    assert torch.allclose(whole(from_hessian(h)), h)
    assert torch.allclose(whole(Single(u)), u[:, :, None] * u[:, None])
    assert torch.equal(Single(u).mixture(seeded())[0], u)
    root, expected = signed()
    assert torch.allclose(whole(root), expected)


def test_columns_are_the_same_in_any_chunks() -> None:
    root, h = signed()
    parts = [hessian_of(root.columns(ids)) for ids in (range(1), range(1, 3))]
    assert torch.allclose(parts[0] + parts[1], h)


@pytest.mark.parametrize("kind", ["hessian", "signs"])
def test_draws_are_unbiased_and_the_same_whether_made_at_once_or_not(kind: str) -> None:
    h = symmetric()
    root = from_hessian(h)
    if kind == "signs":
        root, h = signed()
    draws = Draws.of(root, 20_000, seeded())
    assert (whole(draws) - h).abs().amax() < 0.1 * h.abs().amax()
    few = Draws.of(root, 5, seeded())
    at_once, rest = few.columns(range(5)).u, [few.columns(range(k, k + 1)).u for k in range(5)]
    assert torch.allclose(at_once, torch.cat(rest))


def test_joined_roots_are_block_diagonal_in_the_places_of_their_outputs() -> None:
    (one, first), h = signed(2), symmetric(1)
    where = torch.tensor([2, 0]), torch.tensor([1])
    root = joined([(one, where[0]), (from_hessian(h), where[1])], torch.zeros(N, 3), 3)
    expected = torch.zeros(N, 3, 3)
    expected[:, where[0][:, None], where[0]] = first
    expected[:, 1, 1] = h[:, 0, 0]
    assert torch.allclose(whole(root), expected)
