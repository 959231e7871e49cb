"""Tensors that are parts of others: put together again, cloned as they lie, and overwritten."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secorder._torch.views import cloned, joined, lasting_place


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


def test_the_gradient_on_what_is_overwritten_comes_to_its_lasting_place() -> None:
    layer, x = nn.Linear(3, 4), torch.randn(2, 5, 3)
    made: list[Callable[[], Tensor]] = [
        lambda: layer(x),  # a view
        lambda: layer(x[0]),
        lambda: layer(x).sin(),
        lambda: nn.functional.linear(x, layer.weight),
    ]
    for make in made:
        y, seen = make(), []
        node, number = lasting_place(y)
        node.register_prehook(lambda gradients, number=number, seen=seen: seen.append(gradients[number]))
        y.add_(1.0)
        y[0].mul_(3.0)
        y.square().sum().backward()
        expected = 2 * y.detach()
        expected[0] *= 3
        assert torch.equal(seen[0].reshape(y.shape), expected)


def test_views_of_a_part_or_in_another_order_have_the_place_that_they_have() -> None:
    base = torch.randn(4, 4, requires_grad=True) * 2
    for view in (base[1:], base.t(), base.view(2, 8)[:1], base.unsqueeze(0).expand(2, 4, 4)):
        assert lasting_place(view) == (view.grad_fn, view.output_nr)
    of_leaf = torch.zeros(3, requires_grad=True).view(3, 1)
    assert lasting_place(of_leaf) == (of_leaf.grad_fn, 0)
