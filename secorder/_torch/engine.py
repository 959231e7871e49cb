"""What the autograd engine does now: whether a backward runs, where it will accumulate, when it ends."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .graph import nodes_behind

#: The number of the backward pass that runs now in this thread; outside of any, :data:`NO_BACKWARD`. A pass that is
#: opened inside of another one, as reentrant checkpoints do, has a number of its own.
current_backward: Callable[[], int] = torch._C._current_graph_task_id
NO_BACKWARD = -1

#: Whether the backward pass that runs now keeps what its nodes have saved, so that another may follow.
graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

#: Whether it accumulates all gradients that it comes to: it is not ``torch.autograd.grad``, and has no ``inputs=``.
accumulates_all: Callable[[], bool] = torch.autograd._is_checkpoint_valid

#: Nodes from a layer's output to its parameter: a view, the product of matrices, the weight's transpose, the leaf.
NEAR = 3


def in_backward() -> bool:
    """Whether a backward pass runs now in this thread."""
    return current_backward() != NO_BACKWARD


def backward_since(outer: int) -> bool:
    """Whether a backward pass runs now in this thread that is not the one that ran before (see the number of it)."""
    return current_backward() not in (NO_BACKWARD, outer)


def after_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward pass that runs now has ended. Only inside of one."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def executes_all(node: Any) -> bool:
    """Whether the backward pass that runs now executes all of the graph behind a node: with ``inputs=`` it may not."""
    return all(before is node or will_accumulate(before) for before in nodes_behind([node]))


def accumulate_node(parameter: Tensor) -> Any:
    """The node of the autograd graph that accumulates into ``parameter.grad``."""
    return get_gradient_edge(parameter).node


def accumulates_into(parameters: Iterable[Tensor], node: Any) -> Any:
    """The node that accumulates into one of the parameters, where it is near a node of the graph; else None."""
    wanted = set(map(id, parameters))
    behind, before = [], [node]
    for _ in range(NEAR):
        behind, before = before, []
        for one in behind:
            for following, _ in one.next_functions:
                if following is not None:
                    if id(getattr(following, "variable", None)) in wanted:
                        return following
                    before.append(following)
    return None


def untouched(parameters: Iterable[Any]) -> set[int]:
    """By ``id``, the parameters whose ``.grad`` is what a backward that begins brings, when it has ended.

    They have no gradient now, and no hooks that would change it, or take it away as soon as it is there.
    """
    return {id(p) for p in parameters if p.grad is None and not p._backward_hooks and not p._post_accumulate_grad_hooks}


def has_gradient_hooks(leaf: Tensor) -> bool:
    """Whether anything was registered on a leaf with ``register_hook``."""
    return bool(leaf._backward_hooks)


def first_gradient_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a hook with the whole gradient of a leaf, before other hooks on the leaf change it."""
    handle: RemovableHandle = parameter.register_hook(hook)
    hooks: Any = parameter._backward_hooks
    if len(hooks) > 1:  # by the order of insertion: the engine does not see move_to_end
        others = {key: other for key, other in hooks.items() if key != handle.id}
        for key in others:
            del hooks[key]
        hooks.update(others)
    return handle


def will_accumulate(node: Any) -> bool:
    """Whether the backward pass that runs now executes this node, and accumulates by one of :func:`accumulate_node`.

    ``torch.autograd.grad`` does not: it hands the gradient out.
    """
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError as error:
        if "autograd.grad()" in str(error):  # it captures this very gradient
            return False
        raise
