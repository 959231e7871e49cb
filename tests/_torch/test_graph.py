"""The autograd graph as it is."""

import gc
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder._torch.engine import accumulate_node
from secorder._torch.graph import (
    can_be_run,
    collection_paused,
    current_node,
    dtypes_of,
    elements_by_operation,
    leads_to_these_alone,
    least_precise,
    leaves_of,
    nodes_behind,
    nodes_made,
    number_of,
    operation_of,
    outputs_of,
    packed,
    passes_on,
    recomputed,
    run_node,
    runs_alone,
    saved,
    shape_of,
    tells_recomputation,
    users_of,
)


def test_users_of_a_leaf_are_the_operations_that_take_it() -> None:
    w, x = torch.randn(3, requires_grad=True), torch.randn(2, 3)
    z = x * w + w
    users = users_of([z])
    assert [(node.name(), index) for node, index in users[accumulate_node(w)]] == [
        ("AddBackward0", 1),
        ("MulBackward0", 1),
    ]
    assert users[z.grad_fn] == []


def test_leaves_that_a_graph_ends_in() -> None:
    a, b = torch.randn(2, requires_grad=True), torch.randn(2, requires_grad=True)
    assert leaves_of([(a * b.detach()).sum() + a.exp().sum()]).keys() == {id(a)}
    assert leaves_of([(a * b).sum(), b]) == {id(a): a, id(b): b}
    assert leaves_of([a.detach(), torch.zeros(())]) == {}


def test_each_node_behind_others_comes_once() -> None:
    w = torch.randn(2, requires_grad=True)
    y = w.exp()
    z = y * y.sin()
    nodes = list(nodes_behind([z.grad_fn, y.grad_fn]))
    assert len(nodes) == len(set(nodes)) == 4
    assert {operation_of(node) for node in nodes} == {"Mul", "Sin", "Exp", ""}  # a leaf is no operation


def test_what_a_node_computed() -> None:
    w = torch.randn(3, 4, requires_grad=True)
    values, places = w.max(1)
    assert [(o.number, o.shape) for o in outputs_of(values.grad_fn)] == [(0, (3,))]
    assert shape_of(accumulate_node(w), 0) == (3, 4)
    assert torch.equal(saved(values.grad_fn, "indices"), places)
    assert dtypes_of([w.exp().grad_fn, w.half().grad_fn]) == {w.dtype, torch.float16}


def test_what_a_backward_reaches_beside_known_leaves() -> None:
    x, w = torch.randn(2, requires_grad=True), torch.randn(2, requires_grad=True)
    assert leads_to_these_alone(x.exp().sum() + x.sum(), {id(x)})
    assert leads_to_these_alone(x, {id(x)})
    assert not leads_to_these_alone(w, {id(x)})
    assert not leads_to_these_alone((x * w).exp(), {id(x)})
    assert leads_to_these_alone((x * w).exp(), {id(x), id(w)})


def test_a_hook_sees_the_node_that_it_is_called_for() -> None:
    z = torch.exp(torch.randn(2, requires_grad=True))
    seen: list[Any] = []
    z.grad_fn.register_prehook(lambda g: seen.append(current_node()))
    z.sum().backward()
    assert seen[0] is z.grad_fn


def test_a_node_run_by_itself_sums_over_what_was_broadcast_and_calls_no_hook() -> None:
    w, x = torch.randn(1, 3, requires_grad=True), torch.randn(2, 4, 3)
    z = torch.hypot(w, x)
    w.register_hook(pytest.fail)
    found = run_node(z.grad_fn, [torch.ones_like(z)], 0)
    assert found.shape == (1, 3)
    torch.testing.assert_close(found, (w / z).sum((0, 1))[None].detach())
    many = torch.vmap(lambda g: run_node(z.grad_fn, [g], 0))(torch.ones(5, 2, 4, 3))
    torch.testing.assert_close(many, found.expand(5, 1, 3))


def test_what_a_node_leaves_out_is_zero() -> None:
    x, g = torch.randn(1, 2, 5, requires_grad=True), torch.randn(1, 3, 5, requires_grad=True)
    z = nn.functional.conv1d(x, torch.randn(3, 2, 3), padding=1)
    (first,) = torch.autograd.grad(z, x, g, create_graph=True)
    found = run_node(first.grad_fn, [torch.ones_like(x), None, None], 1)  # for what a convolution is linear in
    assert found.shape == x.shape
    assert not found.any()


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def test_a_users_own_function_cannot_be_run() -> None:
    x = torch.randn(2, requires_grad=True)
    assert can_be_run(x.exp().grad_fn)
    assert not can_be_run(Function.apply(x).grad_fn)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x.exp().tanh()


def test_what_is_not_run_outside_of_the_engine() -> None:
    x = torch.randn(2, requires_grad=True)
    written = torch.zeros(3)
    written[:2] = x
    assert all(runs_alone(node) for node in (x.exp().grad_fn, written.grad_fn))
    for _ in range(3):  # compiled once it has seen what it is called with
        script = scripted(x).grad_fn
    assert not any(runs_alone(node) for node in (Function.apply(x).grad_fn, script))


def test_what_a_checkpoint_computes_again() -> None:
    x = torch.randn(2, 2, requires_grad=True)
    if not tells_recomputation():
        assert recomputed(x.exp().grad_fn) is None
        return
    assert recomputed(checkpoint(torch.exp, x, use_reentrant=False).grad_fn) is True
    assert recomputed(x.exp().grad_fn) is False
    with torch.autograd.graph.save_on_cpu():
        assert recomputed(x.exp().grad_fn) is False
    assert recomputed(torch.cat([x, x]).grad_fn) is False


def test_a_graph_that_was_read_is_freed() -> None:
    x = torch.randn(2, requires_grad=True)
    z = x.exp()
    freed: list[int] = []

    class Told:
        def __call__(self, _: Any) -> None: ...

        def __del__(self) -> None:
            freed.append(1)

    z.grad_fn.register_prehook(Told())
    users_of([z])
    del z
    gc.collect()
    assert freed


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_where_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(KeyError), collection_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_the_least_precise_dtype_of_a_graph() -> None:
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert least_precise([weight]) is torch.float64
    assert least_precise([weight * 2, torch.zeros(1, dtype=torch.float32)]) is torch.float32
    assert least_precise([weight.bfloat16().double() * weight, torch.tensor(1)]) is torch.bfloat16
    assert least_precise([torch.view_as_real(weight.to(torch.complex64))]) is torch.float32


def test_where_a_module_has_backward_hooks_gradients_are_handed_on() -> None:
    module = nn.Linear(3, 2)
    module.register_full_backward_hook(lambda *_: None)
    output = module(torch.randn(1, 3))  # before 2.12 its node goes with it
    node = output.grad_fn
    assert passes_on(node)
    assert not passes_on(node.next_functions[0][0])


def test_numbers_that_an_operation_computes() -> None:
    x = torch.randn(2, 6, requires_grad=True)
    assert elements_by_operation((x.sin() * x).sum()) == (12 + 12 + 1) / 3
    assert elements_by_operation(x) == elements_by_operation(x.detach()) == 0


def test_nodes_are_numbered_as_they_are_made() -> None:
    x, before = torch.randn(3, requires_grad=True), nodes_made()
    z = (x * 2).sum()
    assert [number_of(node) for node in (z.grad_fn.next_functions[0][0], z.grad_fn)] == [before, before + 1]
    assert nodes_made() == before + 2
    with torch.no_grad():
        x * 2
    assert nodes_made() == before + 2


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
def test_what_hooks_have_packed_is_told_without_asking_for_it() -> None:
    x, asked = torch.randn(3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: asked.append(t) or t):
        assert packed(x.exp().grad_fn, "result")
    assert not packed(x.exp().grad_fn, "result")
    assert not asked
