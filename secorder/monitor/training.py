"""The loss and the learning rates of a training."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from .._arguments import shown
from .._torch.collectives import all_reduce
from ..errors import InvalidTypeError


def number_of(name: str, value: Any) -> Any:
    """A number as it is; of a tensor of one element that, without its graph, not read, and wide enough to be summed."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(()).to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(value, Tensor) or not hasattr(type(value), "__float__"):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InvalidTypeError(f"{name!r} must be a number or a tensor of one element, got {got}.")
    return float(value)


def as_floats(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name, those of tensors read."""
    if not isinstance(numbers, Mapping):
        raise InvalidTypeError(f"numbers must be a mapping of names to numbers, got {shown(numbers)}.")
    return {name: float(number_of(name, value)) for name, value in numbers.items()}


def step_of(told: Any) -> int | None:
    """The number of a step; None where it is to be counted."""
    try:
        return None if told is None else index(told)
    except TypeError:
        raise InvalidTypeError(f"step must be an integer, got {shown(told)}: the loss goes into loss=.") from None


def mean_loss(total: Tensor | float, count: int, *, together: bool) -> float:
    """The mean of several steps' losses, from their sum; ``together`` of all ranks, each of which must call this."""
    if not together:
        return float(total) / count
    numbers = torch.stack([torch.as_tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64)])
    numbers = numbers.to(total.device if isinstance(total, Tensor) else numbers.device)
    all_reduce(numbers)
    return float(numbers[0] / numbers[1])


def learning_rates(optimizer: Any, layers: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """The largest learning rate of each layer's parameters; of those that the optimizer (with ``param_groups``) has."""
    if optimizer is None:
        return {}
    by_parameter = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    known = {name: [by_parameter[id(p)] for p in group if id(p) in by_parameter] for name, group in layers.items()}
    return {name: max(rates) for name, rates in known.items() if rates}
