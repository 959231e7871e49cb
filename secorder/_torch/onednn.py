"""Matrix products of float32 on a CPU by oneDNN, which knows the vector units of whatever processor it runs on.

PyTorch multiplies matrices by MKL, which makes no use of AVX-512 on processors of other makers than its own: on one of
AMD's, oneDNN is twice as fast. It is reached by the operator that ``torch.compile`` puts in place of a linear layer,
which has no derivative: the nodes that are put around it here are called, and read, as those of PyTorch's own products.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .autocast import autocast_enabled
from .graph import Node
from .saved_tensors import saved_tensor_hooks_active
from .surroundings import inside_transform

#: Multiplications from which on one product is worth a call of its own: what oneDNN gains is more than a call costs,
#: and two threads have enough to share (measured from 64 to 4,608 rows and columns, on one thread and on two).
ALONE = 1 << 22


def multiplied_by_onednn(like: Tensor, multiplications: int) -> bool:
    """Whether a product of two matrices of a tensor's kind, of so many multiplications, is for oneDNN.

    By shape alone, so that a run can be repeated bit for bit.
    """
    if multiplications < ALONE or like.device.type != "cpu" or like.dtype is not torch.float32:
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_operator()


def product_by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right [+ bias]`` of matrices of float32, which nothing is differentiated through; in new memory.

    Of a right one whose rows are apart from each other, as are a sample's of a sequence that has its steps first,
    oneDNN has no fast product, but one that takes a thousand times as long: that is copied.
    """
    if not (right.is_contiguous() or right.t().is_contiguous()):
        right = right.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, right.t(), bias, "none", [], "")
    return product


def linear_by_onednn(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """``F.linear`` by oneDNN, where that is faster; None where it is not, or somebody's own code has a part in it.

    In the autograd graph it is what PyTorch's own is, to be differentiated as often as one likes.
    """
    if not _fit(bias, x, weight, 1):
        return None
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    found = _differentiable(bias, rows, weight.t())
    return found if x.dim() == 2 else found.unflatten(0, x.shape[:-1])


def addmm_by_onednn(bias: Any, left: Any, right: Any) -> Tensor | None:
    """``torch.addmm`` of a vector and two matrices, likewise."""
    if not _fit(bias, left, right, 0) or left.dim() != 2 or bias is None:
        return None
    return _differentiable(bias, left, right)


def _differentiable(bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = _Mm.apply(left, right) if bias is None else _Addmm.apply(bias, left, right)  # type: ignore
    return product


def _fit(bias: Any, x: Any, matrix: Any, inner: int) -> bool:
    """Whether a product of the rows of x with a matrix, along this dimension of it, is for oneDNN alone."""
    factors = [x, matrix] if bias is None else [x, matrix, bias]
    if not all(type(f) in (Tensor, nn.Parameter) and f.layout is torch.strided for f in factors):
        return False
    if x.dim() < 2 or matrix.dim() != 2 or x.shape[-1] != matrix.shape[inner] or not x.is_contiguous():
        return False
    columns = matrix.shape[1 - inner]
    alike = all(f.dtype is x.dtype and f.device == x.device for f in factors)
    fits = alike and (bias is None or bias.shape == (columns,))
    return fits and multiplied_by_onednn(x, x.numel() * columns) and not _watched()


def _watched() -> bool:
    """Whether what PyTorch does now is transformed, rounded, or kept by others, such as a checkpoint."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return bool(inside_transform()) or autocast_enabled() or saved_tensor_hooks_active() or forward_mode


class _Mm(torch.autograd.Function):
    """``left @ right``."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return product_by_onednn(left, right)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _of_inputs(ctx, g, _wanted)


class _Addmm(torch.autograd.Function):
    """``bias + left @ right``."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return product_by_onednn(left, right, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _of_inputs(ctx, g, _wanted)


def _of_inputs(
    node: Any, g: Tensor, wanted: Callable[[Node], bool] = lambda before: before is not None
) -> tuple[Tensor | None, ...]:
    """The gradients of a product's inputs, as far as they are wanted."""
    left, right = node.saved_tensors
    again = torch.is_grad_enabled() or inside_transform()  # is this to be differentiated, or transformed?
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul if again else product_by_onednn
    ways: list[Callable[[], Tensor]] = [lambda: product(g, right.t()), lambda: product(left.t(), g)]
    if len(node.next_functions) > len(ways):
        ways.insert(0, lambda: g.sum(0))
    edges = zip(ways, node.next_functions, strict=True)
    return tuple([way() if wanted(before) else None for way, (before, _) in edges])


def _wanted(before: Node) -> bool:
    """Whether the backward pass that runs now goes on to a node."""
    try:
        return before is not None and bool(torch._C._will_engine_execute_node(before))
    except RuntimeError:  # of a leaf whose gradient is handed out
        return True


def _named(function: Any, name: str, **saved: Any) -> None:
    """Let the nodes of a function be called as those of PyTorch's operation, and tell what they saved as those do."""
    node = function._backward_cls
    node.__name__ = name
    node.__call__ = _of_inputs
    for key, value in saved.items():
        setattr(node, f"_saved_{key}", value)


_LEFT, _RIGHT = property(lambda node: node.saved_tensors[0]), property(lambda node: node.saved_tensors[1])
_named(_Mm, "MmBackward0", self=_LEFT, mat2=_RIGHT)
_named(_Addmm, "AddmmBackward0", mat1=_LEFT, mat2=_RIGHT, alpha=1, beta=1)


@cache
def _has_operator() -> bool:
    """Whether this PyTorch was built with it; on other processors than those with AVX2 nothing was measured."""
    capable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return capable and hasattr(torch.ops.mkldnn, "_linear_pointwise")
