"""The rules by operation, the maps that carry a gradient to a parameter, and the fallback for other operations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..._arguments import require_callable, require_strings
from ..._torch.graph import Node, can_be_run, outputs_of, run_node
from ..._torch.vjp import chunks, default_chunk_size, quiet_vmap
from ...errors import AttributionError, InvalidArgumentError
from ..layout import Layout
from ..per_sample import PerSample
from .call import OperationCall
from .routed import OwnedRows, put_back

#: ``rule(call, index)``: the per-sample gradient of input ``index``; None where the rule is not for this call.
OperationRule = Callable[[OperationCall, int], PerSample | None]

#: ``map(node, number, gradient, shape, before)``: the per-sample gradient of what the node's output ``number``, of
#: ``shape``, was made of, of shape ``before``; None where it is not for this one.
Map = Callable[[Node, int, PerSample, tuple[int, ...], tuple[int, ...]], PerSample | None]


class Together(NamedTuple):
    """How the calls of an operation are gone through together, when the gradients on all of them have come.

    Such as those of all time steps, each of which costs next to nothing.
    """

    #: ``keep(call, targets)``: what is needed of a call, of whose inputs some are a parameter as it is: by the input's
    #: number, the parameter's name. None where the call is gone through by itself.
    keep: Callable[[OperationCall, Mapping[int, str]], Any]
    #: of what was kept of a call, what is the same for those that are gone through together
    alike: Callable[[Any], object]
    #: the per-sample gradients that what was kept of such calls brings: the number of a call, and of one of its inputs,
    #: and the gradient of that; or that of several calls, by the number of one of them
    bring: Callable[[Sequence[Any]], Iterable[tuple[int, int, PerSample]]]


#: By the name of the operation's node in the autograd graph.
OPERATIONS: dict[str, OperationRule] = {}
TOGETHER: dict[str, Together] = {}
MAPS: dict[str, Map] = {}

R = TypeVar("R", bound=Callable[..., PerSample | None])


def operation_rule(*nodes: str) -> Callable[[OperationRule], OperationRule]:
    """Enter the decorated function as the rule of operations, by the names of their nodes (``type(z.grad_fn)``).

    A rule says what one sample alone brings to an input of the operation, from the gradient on its output and what the
    operation saved for its backward.

    Raises:
        InvalidTypeError: the rule is not callable.
        InvalidArgumentError: an operation has a rule already, or none is named.

    Example:
        >>> from secorder.layers.operations import operation_rule
        >>> @operation_rule("SinhBackward0")
        ... def sinh(call, index):
        ...     return call.of_samples(call.g * call.saved("self").cosh(), call.shape(index))
    """
    return _entered(OPERATIONS, nodes, "rule(call, index)")


def parameter_map(*nodes: str) -> Callable[[Map], Map]:
    """Enter the decorated function as what carries per-sample gradients from a node's output on to its input."""
    return _entered(MAPS, nodes, "map(node, number, gradient, shape, before)")


def _entered(table: dict[str, R], nodes: Sequence[str], call: str) -> Callable[[R], R]:
    if not nodes:
        raise InvalidArgumentError("name the nodes of the autograd graph that the rule is for.")
    for node in require_strings("the name of a node", nodes):
        if node in table:
            raise InvalidArgumentError(f"{node} has a rule already ({table[node].__name__}).")

    def enter(rule: R) -> R:
        require_callable("a rule", rule, call)
        table.update(dict.fromkeys(nodes, rule))
        return rule

    return enter


def per_sample_gradient(call: OperationCall, index: int) -> PerSample | OwnedRows:
    """What each sample brings to an input of an operation, before what the input was made of.

    By its rule; of rows that are put back into their places, by whose these are; else by the operation's own backward,
    run once a sample on the sample's gradient alone. Raises :class:`AttributionError` where there is none.
    """
    rule = OPERATIONS.get(call.node.name())
    found = None if rule is None else rule(call, index)
    if found is not None:
        return found
    rows = put_back(call, index)
    return _by_its_backward(call, index) if rows is None else rows


def _by_its_backward(call: OperationCall, index: int) -> Tensor:
    if not can_be_run(call.node):
        raise AttributionError(f"{call.node.name()} has no backward that can be run for one sample alone.")
    shape = call.shape(index)
    like = next(g for g in call.gradients if g is not None)
    size = default_chunk_size(sum(g.numel() for g in call.gradients if g is not None), like, None)
    found = like.new_empty(call.count, *shape)
    own = outputs_of(call.node, real=False)
    for ids in chunks(call.count, size):
        cotangents = [
            like.new_zeros(len(ids), *output.shape) if g is None else _alone(g, layout, ids)
            for output, g, layout in zip(own, call.gradients, call.layouts, strict=True)
        ]

        def pull(*cotangents: Tensor) -> Tensor:
            given = [c.to(output.dtype) for c, output in zip(cotangents, own, strict=True)]
            gradient = run_node(call.node, given, index)
            return gradient.to_dense() if gradient.is_sparse else gradient

        found[ids.start : ids.stop] = each(pull, cotangents)
    return found


def each(pull: Callable[..., Tensor], cotangents: Sequence[Tensor]) -> Tensor:
    """A node of the graph run for each of stacked gradients, all at once where that can be."""
    try:
        with quiet_vmap():
            result: Tensor = torch.vmap(pull)(*cotangents)
            return result
    except RuntimeError:  # an operator that vmap cannot run: the loop works, or names the operator
        return torch.stack([pull(*one) for one in zip(*cotangents, strict=True)])


def _alone(g: Tensor, layout: Layout, ids: range) -> Tensor:
    """For each of some samples, a gradient that is zero in the rows of all others."""
    split = layout.split(g)
    alone = split.new_zeros(len(ids), *split.shape)
    here = torch.arange(len(ids), device=g.device)
    alone[here, here + ids.start] = split[ids.start : ids.stop]
    return alone if layout.rows == 1 and layout.dim == 0 else torch.stack([layout.join(one) for one in alone])
