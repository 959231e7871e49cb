"""How the training loss is made of the samples' losses: L = Σ_n c_n ℓ_n, so that ∂ℓ_n/∂z_n = g_n / c_n."""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..._arguments import require_integer, shown
from ...errors import InvalidArgumentError, InvalidTypeError


class HasScale(Protocol):
    """A loss scaler, such as ``torch.amp.GradScaler``."""

    def get_scale(self) -> float:
        """The factor of now."""


LossScale = float | HasScale | Callable[[], float] | Literal["returned"] | None

#: The weights c_n of one batch: from the arguments of the model's call, a 1-D tensor of N numbers.
Weights = Callable[..., Tensor | None]

Reduction = Literal["mean", "sum"] | nn.Module | Weights | None


def loss_scale_of(given: LossScale) -> Callable[[], float]:
    """What tells the loss scale of now: of a positive number, a function, or what has ``get_scale()``."""
    if isinstance(given, type):
        raise InvalidArgumentError(f"loss_scale is the class {given.__name__}, not made yet: pass the one in use.")
    if given is None or (isinstance(given, str) and given == "returned"):  # then it is found in each backward
        return _Constant(1.0)
    if hasattr(given, "get_scale"):
        return given.get_scale
    if callable(given):
        return given
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < math.inf:
        raise InvalidArgumentError(
            'loss_scale must be a positive number, a GradScaler, a function that returns a number, or "returned", got '
            f"{shown(given)}."
        )
    return _Constant(float(given))


def usable_scale(function: Callable[[], float]) -> float:
    """What a function gives as the loss scale of now, if something can be divided by it."""
    if type(function) is _Constant:  # looked at when it was given
        return function()
    try:
        told = function()
    except Exception as error:
        raise InvalidArgumentError(
            f"loss_scale= raised {type(error).__name__}: {error}. It is called without arguments, and returns what the "
            "loss is multiplied by before backward."
        ) from error
    try:
        scale = float(told)
    except (TypeError, ValueError, RuntimeError):
        scale = 0.0
    if not scale or not math.isfinite(scale):
        raise InvalidArgumentError(f"loss_scale= returned {told!r}: it must return a finite number, not zero.")
    return scale


class _Constant:
    """A function that returns one number, and can be pickled."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __call__(self) -> float:
        return self._value


def check_reduction(given: Reduction) -> Literal["mean", "sum"] | Weights:
    """``"mean"``, ``"sum"``, or a function that tells the weights of a batch."""
    if given is None:
        return "mean"
    if isinstance(given, type):
        raise InvalidArgumentError(f"reduction is the class {given.__name__}, not made yet: pass {given.__name__}().")
    kind = getattr(given, "reduction", None) if isinstance(given, nn.Module) else given
    if isinstance(kind, str) and kind in ("mean", "sum"):
        weighs = getattr(given, "weight", None) is not None or getattr(given, "ignore_index", -100) != -100
        if kind == "mean" and isinstance(given, nn.Module) and weighs:
            raise InvalidArgumentError(
                f"{type(given).__name__} with weight= or ignored targets weights samples by their targets, which the "
                "model does not get: pass reduction= with a function of the model's arguments that returns the "
                "weights c_n of L = Σ_n c_n ℓ_n."
            )
        return "mean" if kind == "mean" else "sum"
    if callable(given) and not isinstance(given, nn.Module):
        return given
    raise InvalidArgumentError(
        'reduction must be "mean", "sum", a loss module with one of these, or a function of the model\'s arguments '
        f"that returns the weights of the samples' losses, got {shown(given)}."
    )


def weights_of(function: Weights, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int) -> Tensor | None:
    """The weights c_n of a batch, one real number a sample; None where there are none, for a mean over the samples."""
    try:
        with torch.no_grad():
            weights = function(*args, **kwargs)
    except InvalidArgumentError:
        raise
    except Exception as error:
        raise InvalidArgumentError(
            f"reduction= raised {type(error).__name__}: {error}. It is called as the model is, and returns the weights "
            "c_n of L = Σ_n c_n ℓ_n."
        ) from error
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != (num_samples,) or weights.is_complex():
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise InvalidArgumentError(
            f"reduction= returned {shape} for a batch of {num_samples} samples: it must return a 1-D tensor of the "
            "weights c_n of L = Σ_n c_n ℓ_n, one a sample."
        )
    return weights.detach()


def token_weights(
    labels: str | int = "labels", *, ignore_index: int = -100, shift: int = 0, items: str = "num_items_in_batch"
) -> Weights:
    """The weights c_n of a loss that is a mean over tokens, from labels that the model is called with.

    With padding, samples have different numbers of tokens: L = Σ_n c_n ℓ_n, ℓ_n the mean over the tokens of sample n,
    c_n = tokens_n / Σ_m tokens_m. Where the loss is divided by a number of tokens of several batches
    (``num_items_in_batch``, as Hugging Face's ``Trainer`` passes it), c_n = tokens_n / that number.

    Args:
        labels: name or position of the argument that holds them: integers of shape ``(N, …)``.
        ignore_index: the label of what does not count.
        shift: how many labels of each sequence the loss leaves out at the start: 1 for a causal language model.
        items: name of the argument that holds the number that the loss is divided by.

    Raises:
        InvalidTypeError: ``labels`` is neither a name nor a position, or a number is no integer.
        InvalidArgumentError: a position, or ``shift``, is below zero.

    Example:
        >>> import torch
        >>> from secorder import token_weights
        >>> labels = torch.tensor([[1, 2, -100, -100], [3, 4, 5, 6]])
        >>> token_weights()(labels=labels)
        tensor([0.3333, 0.6667])
    """
    if isinstance(labels, Tensor):
        raise InvalidTypeError("labels must be the name or the place of the argument that holds them, not the labels.")
    if not isinstance(labels, str):
        require_integer("labels", labels, 0)
    require_integer("ignore_index", ignore_index, -sys.maxsize)
    require_integer("shift", shift, 0)
    return partial(_token_weights, labels, ignore_index, shift, items)  # which can be pickled


def _token_weights(
    which: str | int, ignore_index: int, shift: int, divided_by: str, /, *args: Any, **kwargs: Any
) -> Tensor:
    """The weights of one batch, shape ``(N,)``, zero for a sample without a token."""
    labels = kwargs.get(which) if isinstance(which, str) else next(iter(args[which:]), None)
    if not isinstance(labels, Tensor) or not labels.dim():
        raise InvalidArgumentError(f"token_weights found no labels: the model has no argument {which!r}.")
    counted = labels if labels.dim() == 1 else labels[:, shift:].flatten(1)
    tokens = (counted != ignore_index).to(torch.get_default_dtype())
    tokens = tokens if labels.dim() == 1 else tokens.sum(1)
    items = kwargs.get(divided_by)
    return tokens / (tokens.sum() if items is None else items)
