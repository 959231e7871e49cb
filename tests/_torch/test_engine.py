"""What the autograd engine does now."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder._torch.engine import (
    NO_BACKWARD,
    accumulate_node,
    accumulates_all,
    accumulates_into,
    after_backward,
    current_backward,
    executes_all,
    first_gradient_hook,
    has_gradient_hooks,
    in_backward,
    will_accumulate,
)
from secorder._torch.graph import current_node


def test_a_backward_is_known_from_inside() -> None:
    x = torch.ones(2, requires_grad=True)
    numbers: list[int] = []
    y = 2 * x
    y.register_hook(lambda g: numbers.append(current_backward()))
    assert not in_backward()
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert not in_backward()
    first, second = numbers
    assert first != second
    assert NO_BACKWARD not in numbers
    assert current_backward() == NO_BACKWARD


def test_a_backward_inside_of_another_one_is_its_own() -> None:
    numbers: list[int] = []

    def inner(x: Tensor) -> Tensor:
        y = x.sin()
        if y.requires_grad:
            y.register_hook(lambda g: numbers.append(current_backward()))
        return y

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(inner, x, use_reentrant=True)
    y.register_hook(lambda g: numbers.append(current_backward()))
    y.sum().backward()
    assert len(set(numbers)) == 2


def test_the_end_of_a_backward_calls_back_once_all_is_accumulated() -> None:
    x = torch.ones(2, requires_grad=True)
    found: list[Tensor | None] = []
    y = 2 * x
    y.register_hook(lambda g: after_backward(lambda: found.append(x.grad)))
    y.sum().backward()
    assert len(found) == 1
    assert torch.equal(found[0], torch.full((2,), 2.0))


def test_where_a_parameter_accumulates() -> None:
    layer, x = nn.Linear(2, 3), torch.ones(4, 2)
    node = accumulate_node(layer.weight)
    assert node.variable is layer.weight
    assert accumulates_into([layer.weight, layer.bias], layer(x).grad_fn).variable is layer.bias
    assert accumulates_into([layer.weight], layer(x).grad_fn) is node  # behind a transposition
    assert accumulates_into([layer.weight], layer(x.repeat(5, 1, 1)).grad_fn) is node  # and a view
    assert accumulates_into([layer.weight], (2 * (2 * layer(x))).grad_fn) is None  # too far


def test_whether_a_parameter_will_accumulate_in_this_backward() -> None:
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
    answers: list[tuple[bool, bool]] = []
    z = used(torch.ones(1, 2))
    z.register_hook(
        lambda g: answers.append(
            (will_accumulate(accumulate_node(used.weight)), will_accumulate(accumulate_node(unused.weight)))
        )
    )
    z.sum().backward(retain_graph=True)
    assert answers.pop() == (True, False)
    torch.autograd.grad(z.sum(), [used.weight], retain_graph=True)
    assert answers.pop() == (False, False)
    torch.autograd.grad(z.sum(), [used.bias], retain_graph=True)
    assert answers.pop() == (False, False)
    z.sum().backward(inputs=[used.weight], retain_graph=True)
    assert answers.pop() == (True, False)


def test_a_hook_before_all_others_that_change_the_gradient() -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda g: g * 2)
    x.register_hook(lambda g: g * 3)
    handle = first_gradient_hook(x, lambda g: seen.append(g.clone()))
    x.sum().backward()
    handle.remove()
    x.sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.ones(2))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2,), 12.0))


def test_a_backward_that_leaves_out_a_part_of_the_graph() -> None:
    x, w = (torch.ones(2, requires_grad=True) for _ in range(2))
    y = w * x.sin()
    found: list[tuple[bool, bool]] = []
    y.grad_fn.register_prehook(  # type: ignore[union-attr]
        lambda _: found.append((executes_all(current_node()), accumulates_all()))
    )
    y.sum().backward(retain_graph=True)
    y.sum().backward(inputs=[x, w], retain_graph=True)
    torch.autograd.grad(y.sum(), w, retain_graph=True)
    y.sum().backward(inputs=[w])
    assert found == [(True, True), (True, False), (False, False), (False, False)]


def test_hooks_on_a_leaf() -> None:
    leaf = torch.zeros(2, requires_grad=True)
    assert not has_gradient_hooks(leaf)
    handle = leaf.register_hook(lambda g: None)
    assert has_gradient_hooks(leaf)
    handle.remove()
    assert not has_gradient_hooks(leaf)
