"""The loss, checked: is it a finite scalar, does it depend on the model?"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments import require_callable, shown
from .._torch.graph import least_precise
from .._torch.own_hooks import outputs_seen
from .._torch.pytree import tensors_in
from .._torch.vjp import gradients
from ..errors import InvalidArgumentError, InvalidTypeError, NonFiniteError
from ..layers.selection import parameters_of, select_layers
from .independence import without_gradients
from .isolation import IsolatedModel, isolate
from .output_hessian import filled
from .overwriting import on_copies


class LossAndGradient(NamedTuple):
    """The loss of a batch, and its gradient in each of some tensors."""

    loss: Tensor
    gradient: list[Tensor]
    kind: torch.dtype  #: the least precise one that they were computed in

    @classmethod
    def of(cls, loss: Tensor, tensors: Sequence[Tensor]) -> "LossAndGradient":
        """Those of a loss that was computed, with zeros for what it does not depend on."""
        found = filled(gradients(loss, tensors), tensors)
        return cls(loss.detach(), [g.detach() for g in found], least_precise([loss]))


def require_loss_function(loss_fn: Any) -> None:
    """Raise unless a loss can be called: it is a class, a name, or anything else that is no function."""
    require_callable("loss_fn", loss_fn, "loss_fn(outputs, targets)")
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise InvalidTypeError(
            f"loss_fn must be callable as loss_fn(outputs, targets), whose arguments are {signature} ({error}): wrap "
            "it in a function of these two, the second of which may be None."
        ) from error


@contextmanager
def explains_targets(inputs: Any, targets: Any) -> Iterator[None]:
    """Tell of targets that are missing, put into the inputs, or no tensors, where a call fails for its arguments."""
    try:
        yield
    except InvalidTypeError:
        raise
    except (TypeError, AttributeError) as error:
        asked = error.obj if isinstance(error, AttributeError) and error.name else targets
        if targets is None and asked is None:
            advice = _advice(inputs) if isinstance(inputs, (tuple, list)) else "pass targets"
            raise InvalidArgumentError(f"the call failed without targets: {advice}. ({error})") from error
        if (
            not isinstance(asked, (nn.Module, Tensor))
            and targets is not None
            and next(tensors_in(targets), None) is None
        ):
            raise InvalidTypeError(
                f"the call failed with targets that hold no tensor, {shown(targets)}: pass torch.as_tensor(targets). "
                f"({error})"
            ) from error
        raise


def _advice(inputs: Sequence[Any]) -> str:
    """What a tuple or list that was taken for several inputs of the model may have been meant to be."""
    if inputs and all(isinstance(x, (tuple, list)) for x in inputs):
        return f"if each entry is a batch, make it a pair (inputs, targets) in place of {len(inputs[0])} entries"
    if len(inputs) > 2:
        return "all entries were passed to the model: make each batch a pair (inputs, targets)"
    return "if the inputs are (inputs, targets), pass them as two arguments" if len(inputs) == 2 else "pass targets"


def check_loss(loss: Any, isolated: IsolatedModel, inputs: Any) -> Tensor:
    """The loss, if curvature can be measured on it: a finite real scalar.

    Of one that is not finite, the error names the layer whose output was the first to be so.
    """
    if not isinstance(loss, Tensor):
        raise InvalidTypeError(f"loss_fn must return a scalar tensor, got {type(loss).__name__}.")
    if loss.is_complex():
        raise InvalidTypeError("loss_fn must return a real number, got a complex one: take its .abs() or .real.")
    if loss.numel() != 1:
        raise InvalidArgumentError(
            f"loss_fn must return a scalar, got shape {tuple(loss.shape)}: reduce it, for example with .mean()."
        )
    if not math.isfinite(loss.item()):
        where = _first_non_finite(isolated, inputs)
        raise NonFiniteError(f"the loss is {loss.item()}{where}: there is no curvature to measure here.")
    return loss.reshape(())


def losses(model: nn.Module, loss_fn: Any, batches: Iterable[tuple[Any, Any]]) -> Tensor:
    """The loss on each of several batches, from the same state, without gradients; shape ``(len(batches),)``."""
    require_loss_function(loss_fn)
    found = []
    with isolate(model, loss_fn, []) as isolated:
        for x, t in batches:
            with explains_targets(x, t):
                value = without_gradients(lambda x: on_copies(loss_fn)(isolated.forward(x), t), x)  # noqa: B023
            found.append(check_loss(value, isolated, x).detach())
    return torch.stack(found)


def losses_and_gradients(
    model: nn.Module, loss_fn: Any, batches: Iterable[tuple[Any, Any]], *, evaluation: bool
) -> list[LossAndGradient]:
    """The loss on each of several batches, from the same state, and its gradient in each of the model's parameters.

    Without autocast, so that sums of them can be compared.
    """
    require_loss_function(loss_fn)
    found = []
    with isolate(model, loss_fn, select_layers(model, "all", unchecked=True), direct=True) as isolated:
        if evaluation:
            model.eval()
        replacements = [isolated.replacement(p) for p in parameters_of(model)]
        for x, t in batches:
            with explains_targets(x, t):
                loss = check_loss(on_copies(loss_fn)(isolated.forward_in_full_precision(x), t), isolated, x)
            found.append(LossAndGradient.of(loss, replacements))
    return found


def _first_non_finite(isolated: IsolatedModel, inputs: Any) -> str:
    """Where a non-finite value began, in words (one more forward, without gradients)."""

    def finite(tree: Any) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in tensors_in(tree) if t.is_floating_point())

    if not finite(inputs):
        return " and the inputs hold non-finite values already"
    found: list[str] = []

    def see(name: str, output: Any) -> None:
        if not found and not finite(output):
            found.append(name)

    with outputs_seen([(name, module) for name, module in isolated.model.named_modules() if name], see):
        without_gradients(isolated.forward, inputs)
    return f", first in the output of layer {found[0]!r}" if found else ""


def require_dependence(model: nn.Module, loss_fn: Any, inputs: Any, targets: Any) -> None:
    """Raise unless the loss depends on some parameter of the model, selected or not."""
    parameters = parameters_of(model)
    everything = select_layers(model, "all", unchecked=True)
    with isolate(model, loss_fn, everything, direct=True) as isolated:
        loss = loss_fn(isolated.forward(inputs), targets)
        replacements = [isolated.replacement(p) for p in parameters]
        if any(g is not None for g in gradients(loss.sum(), replacements)):
            return
    raise InvalidArgumentError(
        "the loss does not depend on the model's parameters: loss_fn must be computed from the model's output "
        "without .detach(), .item() or torch.no_grad()."
    )
