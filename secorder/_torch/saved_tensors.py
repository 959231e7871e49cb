"""Tensors that are kept from forward to backward, as autograd keeps its own."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .autocast import autocast_enabled
from .versions import versions


class OverwrittenError(Exception):
    """A tensor that was kept has been changed in place."""


def keep(tensors: Iterable[Tensor], *, here: bool = False) -> "Kept":
    """Keep tensors until backward as autograd does, also in a checkpoint; or ``here``, whatever autograd was told."""
    return KeptHere(tensors) if here or not saved_tensor_hooks_active() else _KeptByAutograd(tensors)


def surrounded_as_usual() -> bool:
    """Whether a call is recorded for backward as it is: no autocast, no checkpoint, no backward that computes it."""
    return (
        torch.is_grad_enabled()
        and not autocast_enabled()
        and torch._C._current_graph_task_id() == -1
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def saved_tensor_hooks_active() -> bool:
    """Whether something, such as an activation checkpoint, takes the tensors that autograd saves now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def checkpoint_section() -> Any:
    """What stands for the part of a forward that a checkpoint is computing, or computing again; None outside of one.

    PyTorch does not tell it by itself: a part that is computed again refers to what it was when it was computed first.
    """
    again = section_computed_again()
    return _of_hooks("frame") if again is None else again


def section_computed_again() -> Any:
    """What stands for the part of a forward that a checkpoint is computing again; None outside of one."""
    again = _of_hooks("target_frame_ref")
    return None if again is None else again()


def _of_hooks(name: str) -> Any:
    """What the hooks on saved tensors of now know by a name."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    pack = inspect.unwrap(hooks[0])
    return inspect.getclosurevars(pack).nonlocals.get(name) if inspect.isfunction(pack) else None


class KeptHere:
    """Tensors as they were when they were kept, whatever autograd was told, at a fraction of the cost of its way."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = tuple(map(Tensor.detach, tensors))
        self._versions = versions(self._tensors)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors; raises :class:`OverwrittenError` where one was changed in place since."""
        if versions(self._tensors) != self._versions:
            raise OverwrittenError
        return self._tensors


#: What the nodes of :class:`_KeptByAutograd` are on, so that no reference cycle forms.
_LEAF = torch.empty(0, requires_grad=True, device="cpu")


class _KeptByAutograd:
    """In a node of its own, whose output lives as long as this: with it, older versions of PyTorch free the node."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._output: Tensor = _Node.apply(_LEAF, *map(Tensor.detach, tensors))  # type: ignore[no-untyped-call]

    def tensors(self) -> tuple[Tensor, ...]:
        """The same."""
        node: Any = self._output.grad_fn
        try:
            return tuple(node.saved_tensors)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise OverwrittenError from error
            raise


Kept = KeptHere | _KeptByAutograd


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # never part of a backward pass
        raise AssertionError


def keeps_arguments(node: Any) -> bool:
    """Whether a node only keeps what a checkpoint was called with, as PyTorch's did up to 2.11."""
    return type(node).__name__ == "_NoopSaveInputsBackward"


def stops_recomputation(error: BaseException) -> bool:
    """Whether an exception is a checkpoint's own, by which it stops computing again what it has got by now."""
    return type(error).__name__ == "_StopRecomputationError"
