"""Tensors that are parts of others: put together again, and cloned as they lie."""

import torch

from secorder._torch.views import cloned, joined


def test_parts_of_one_vector_are_joined_without_a_copy() -> None:
    base = torch.arange(8.0)
    first, second = base.split([6, 2])
    assert joined([first, second]) is base
    assert joined([first.mul_(2), second]) is base
    for parts in ([second, first], [first, second.clone()], [base[:6], base[4:6]], [first], [base[::2], base[4:]]):
        assert joined(parts) is not base
        assert torch.equal(joined(parts), torch.cat(parts))
    w = torch.ones(8, requires_grad=True)
    assert joined((w * 2).split([6, 2])).requires_grad


def test_a_clone_lies_in_memory_as_what_it_is_of() -> None:
    base = torch.randn(3, 5, 4)
    for part in (base, base[:, 1:3], base[:, ::2], base.mT, base[..., 1], base.unfold(1, 3, 1), base[:, :1].mT):
        copy = cloned(part)
        assert (copy.stride(), copy.dtype) == (part.stride(), part.dtype)
        assert torch.equal(copy, part)
        assert copy.data_ptr() != part.data_ptr()
    expanded = base[:, :1].expand(-1, 6, -1)
    assert torch.equal(cloned(expanded), expanded)
    leaf = base.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cloned(leaf[:, 1:3]).sum(), leaf)
    assert torch.equal(gradient.sum((0, 2)), torch.tensor([0.0, 12.0, 12.0, 0.0, 0.0]))
