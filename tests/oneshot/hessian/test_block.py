"""A Hessian before a step, in every form, is what the matrix of it says."""

import pytest
import torch
from torch import Tensor

from secorder.oneshot.hessian.block import Block, Memory

N, K, J, SIZE, BEFORE = 3, 2, 6, 4, 5


def forms() -> dict[str, Block]:
    torch.manual_seed(0)
    u, d = torch.randn(N, K, SIZE), torch.randn(N, SIZE)
    v = u * torch.randn(N, K, 1)
    matrix = torch.randn(N, SIZE, SIZE)
    return {
        "columns": Block(u, u),
        "pairs of columns": Block(u, v),
        "columns with weights": Block(u, u, torch.randn(N, K)),
        "and a diagonal": Block(u, v, torch.randn(N, K), d),
        "and rows": Block(u, u, None, d, (torch.randn(J, SIZE), torch.randn(N, J))),
        "matrix": Block(matrix=(matrix + matrix.mT).transpose(0, 1).contiguous()),
    }


@pytest.mark.parametrize("form", ["columns", "rows", "matrix"])
def test_before_a_large_matrix_in_single_precision(form: str) -> None:
    u, weight = torch.randn(8, 64, 128), torch.randn(96, 128)
    rows, s = torch.randn(128, 128), torch.randn(8, 128)
    symmetric = (u[:, :, None] * u[:, None]).sum(3).tile(1, 2, 2)

    def block(dtype: torch.dtype) -> Block:
        columns = u.to(dtype)
        if form == "matrix":
            return Block(matrix=symmetric.to(dtype).transpose(0, 1).contiguous())
        return Block(columns, columns, rows=(rows.to(dtype), s.to(dtype)) if form == "rows" else None)

    for diagonal in (False, True):
        found, expected = (
            block(kind).before_matrix(weight.to(kind), diagonal=diagonal) for kind in (torch.float32, torch.float64)
        )
        scale = expected.diagonal().abs().amax()
        assert (found.diagonal() - expected.diagonal()).abs().amax() < 1e-5 * scale
        if not diagonal:
            assert (found.full() - expected.full()).abs().amax() < 1e-5 * scale


def full(block: Block) -> Tensor:
    return block.full().clone()


@pytest.mark.parametrize("name", forms())
def test_every_form_is_its_matrix(name: str) -> None:
    block = forms()[name]
    matrix = full(block)
    torch.testing.assert_close(block.diagonal(), matrix.diagonal(dim1=1, dim2=2))
    vectors = torch.randn(6, N, SIZE)
    torch.testing.assert_close(block.times(vectors), torch.einsum("nij,knj->kni", matrix, vectors))
    if block.matrix is None and block.rows is None:
        torch.testing.assert_close(full(block.of_samples(slice(1, 3))), matrix[1:3])


@pytest.mark.parametrize("name", forms())
def test_before_a_matrix(name: str) -> None:
    weight = torch.randn(BEFORE, SIZE)
    expected = weight @ full(forms()[name]) @ weight.t()
    for factored in (False, True):
        found = forms()[name].before_matrix(weight, diagonal=False, factored=factored)
        torch.testing.assert_close(found.diagonal().clone(), expected.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(full(found), expected)
    only = forms()[name].before_matrix(weight, diagonal=True).diagonal()
    torch.testing.assert_close(only, expected.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("second", [None, torch.arange(12.0).view(N, SIZE)], ids=["linear", "curved"])
@pytest.mark.parametrize("name", forms())
def test_before_a_function_of_each_element(name: str, second: Tensor | None) -> None:
    first = torch.randn(N, SIZE)
    expected = full(forms()[name]) * first[:, :, None] * first[:, None]
    if second is not None:
        expected = expected + torch.diag_embed(second)
    torch.testing.assert_close(full(forms()[name].before_elementwise(first, second)), expected)
    only = Block(only=forms()[name].diagonal()).before_elementwise(first, second)
    torch.testing.assert_close(only.diagonal(), expected.diagonal(dim1=1, dim2=2))


def test_room_has_nothing_in_common_with_what_is_in_use_and_is_used_again() -> None:
    memory, like = Memory(), torch.zeros(1)
    first = memory.room(like, 4, 5)
    second = memory.room(like, 2, 3, beside=(first,))
    third = memory.room(second, 6, beside=(None, first))
    assert len({t.untyped_storage().data_ptr() for t in (first, second, third)}) == 3
    assert memory.room(third, 10, beside=(second,)).data_ptr() == first.data_ptr()
    assert memory.room(first, 50, beside=(second,)).shape == (50,)
    assert len(memory.pieces) == 3
