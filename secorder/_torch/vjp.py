"""Vector-Jacobian and Hessian-vector products of many vectors at once, in chunks of bounded memory."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._arguments import require_integer
from ..errors import DoubleBackwardError
from .differentiability import once_differentiable_functions
from .failures import is_out_of_memory, is_users_own, is_vmap_failure
from .memory import free_memory

#: Memory that one batched product may take for its vectors and intermediates, where no chunk size is given: what fits
#: a CPU's caches (measured: twice as fast as eight times as much), and enough to keep an accelerator busy, or a part of
#: what is free on it, where that can be told.
CHUNK_BYTES = {"cpu": 1 << 25}
ACCELERATOR_CHUNK_BYTES = 1 << 28
PART_OF_FREE_MEMORY = 8

#: What a Hessian-vector product passes through from which on it is made alone on a CPU. Measured: together they take a
#: quarter to a third more in networks with group normalisation and attention, and a tenth less at best in others.
ALONE_BYTES = 1 << 19

#: What an operation has to compute for that, on average: of smaller ones (the steps of a recurrent cell) it is their
#: number that takes the time, twice as much alone.
LONG_OPERATION_BYTES = 1 << 15

#: A tensor of a graph, or the edge that names it.
End = GradientEdge | Tensor


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Inside, vmap does not tell of every operator that it runs in a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def stacked_vjp(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """K vector-Jacobian products ``Σ_i (∂outputs_i/∂inputs)ᵀ cotangents_i[k]`` on a graph that is kept.

    Cotangents have the shape ``(K, *output.shape)``, what is returned ``(K, *input.shape)``, zeros where an input is
    not reached. With gradients as outputs these are Hessian-vector products. Batched by vmap, fewer at once where
    memory does not do; where an operator has no batching rule, one after the other.
    """
    count = cotangents[0].shape[0]
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad]
    if not live or not inputs:
        return [x.new_zeros((count, *x.shape)) for x in inputs]
    reached, given = [o for o, _ in live], [c for _, c in live]
    batched = _batched_vjp(reached, inputs, given, create_graph) if count > 1 else None
    if batched is not None:
        return batched
    # An operator that vmap cannot run: the loop works, or names the operator.
    single = [_vjp(reached, inputs, [c[k] for c in given], create_graph) for k in range(count)]
    if count == 1:
        return [x[None] for x in single[0]]
    return [torch.stack(column) for column in zip(*single, strict=True)]


def split_like(stack: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Stacked vectors of the elements of all tensors together, tensor by tensor, each ``(K, *tensor.shape)``.

    Of shape ``(K, total)``, or ``(K, N, total)`` of the elements of each sample, for tensors with N samples in dim 0.
    """
    rows = stack.shape[1:-1].numel()
    parts = stack.split([t.numel() // rows for t in tensors], -1)
    return [part.reshape(len(stack), *t.shape).to(t) for part, t in zip(parts, tensors, strict=True)]


def _batched_vjp(
    outputs: list[Tensor], inputs: Sequence[Tensor], cotangents: list[Tensor], create_graph: bool
) -> list[Tensor] | None:
    """By vmap, in halves where memory does not do at once; None where an operator has no batching rule."""
    count = len(cotangents[0])
    try:
        with quiet_vmap():
            results = torch.autograd.grad(
                outputs,
                _ends(inputs),
                cotangents,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
        found = zip(inputs, results, strict=True)
        return [x.new_zeros((count, *x.shape)) if r is None else _written_out(r) for x, r in found]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            if is_vmap_failure(error):
                return None
            raise
    half = count // 2  # outside of the handler, which holds on to what filled the memory
    parts = [
        stacked_vjp(outputs, inputs, [c[rows] for c in cotangents], create_graph=create_graph)
        for rows in (slice(half), slice(half, None))
    ]
    return [torch.cat(pair) for pair in zip(*parts, strict=True)]


def placeholder(node: Any, number: int) -> Tensor:
    """A zero in the place of what a node of the graph computed: differentiating with respect to it is doing so there.

    It takes no memory, and knows the node, which keeps the graph. :func:`gradients` and :func:`stacked_vjp` take it
    among their inputs.
    """
    seen = node._input_metadata[number]
    zero = torch.zeros((), dtype=seen.dtype, device=seen.device).expand(tuple(seen.shape))
    zero._end = GradientEdge(node, number)  # type: ignore[attr-defined]
    return zero


def _ends(inputs: Sequence[End]) -> Any:
    """Where in the graph inputs are."""
    return [getattr(x, "_end", x) for x in inputs]


def _vjp(outputs: list[Tensor], inputs: Sequence[Tensor], cotangents: list[Tensor], create_graph: bool) -> list[Tensor]:
    results = gradients(outputs, inputs, cotangents, create_graph=create_graph)
    return [torch.zeros_like(x) if r is None else r for x, r in zip(inputs, results, strict=True)]


def gradients(
    outputs: Tensor | Sequence[End],
    inputs: Sequence[End],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """``torch.autograd.grad`` on a graph that is kept; None for an input that is not reached.

    Raises :class:`DoubleBackwardError` where an operator on the way cannot be differentiated.
    """
    if not inputs or (isinstance(outputs, Tensor) and not outputs.requires_grad):  # a constant reaches none
        return [None] * len(inputs)
    ends: Any = outputs
    try:
        found = torch.autograd.grad(
            ends, _ends(inputs), cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        if is_out_of_memory(error) or is_users_own(error):
            raise
        raise _double_backward_error(error) from error
    names = once_differentiable_functions([g for g in found if g is not None]) if create_graph else None
    if names is not None:  # autograd itself would not tell
        raise DoubleBackwardError(
            f"{', '.join(sorted(names)) or 'an autograd.Function'} is marked once_differentiable, so that it has no "
            "second derivative: give it a differentiable backward."
        )
    return [None if g is None else _written_out(g) for g in found]


def _written_out(gradient: Tensor) -> Tensor:
    """A gradient that may be computed with in place, as the zeros that are none in memory may not.

    The second derivative of ``abs`` is one of these.
    """
    return gradient.clone() if gradient._is_zerotensor() else gradient


def _double_backward_error(error: RuntimeError) -> DoubleBackwardError:
    """The library's error for one of autograd's, with the way out where there is one."""
    reason = str(error).strip().splitlines()[0].partition(". ")[0]
    if "heckpoint" in reason:
        return DoubleBackwardError(
            "the model uses reentrant activation checkpointing, which autograd.grad cannot pass: call "
            "torch.utils.checkpoint.checkpoint with use_reentrant=False."
        )
    return DoubleBackwardError(
        f"an operator of the model or the loss cannot be differentiated as often as this needs ({reason}): replace "
        "it by one with a double backward."
    )


def default_chunk_size(elements: int, like: Tensor, chunk_size: int | None) -> int:
    """How many products to batch: ``chunk_size``, or as many as fit :data:`CHUNK_BYTES` if each has these elements."""
    if chunk_size is not None:
        return chunk_size
    budget = CHUNK_BYTES.get(like.device.type, ACCELERATOR_CHUNK_BYTES)
    free = free_memory(like.device)
    if free is not None:
        budget = free // PART_OF_FREE_MEMORY
    return max(1, budget // max(1, 4 * elements * like.element_size()))


def products_at_once(elements: int, like: Tensor, chunk_size: int | None, by_operation: float) -> int:
    """How many Hessian-vector products to batch: as :func:`default_chunk_size`, but on a CPU no long ones.

    Of a model whose operations compute so many numbers each, on average (``by_operation``).
    """
    size = like.element_size()
    long = elements * size >= ALONE_BYTES and by_operation * size >= LONG_OPERATION_BYTES
    return (
        1
        if chunk_size is None and long and like.device.type == "cpu"
        else default_chunk_size(elements, like, chunk_size)
    )


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise unless it is None or at least 1."""
    if chunk_size is not None:
        require_integer("chunk_size", chunk_size, 1)


def chunks(total: int, size: int) -> Iterator[range]:
    """``range(total)`` in consecutive ranges of at most ``size``."""
    for start in range(0, total, size):
        yield range(start, min(total, start + size))
