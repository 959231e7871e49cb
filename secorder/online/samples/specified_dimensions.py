"""Where samples are, as a user told it, for passes of our own, which take them from one dimension of all inputs."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from torch import nn

from ..._torch.pytree import Shared
from ...errors import InvalidArgumentError
from .hypotheses import SampleDim


def require_known_arguments(model: nn.Module, sample_dim: SampleDim) -> None:
    """Raise where a mapping names what the model is not called with, as far as its signature tells, or nothing."""
    if not isinstance(sample_dim, Mapping):
        return
    taken = signature(model.forward).parameters
    unknown = [name for name in sample_dim if name not in taken]
    if not sample_dim or (unknown and not any(p.kind is Parameter.VAR_KEYWORD for p in taken.values())):
        raise InvalidArgumentError(
            f"sample_dim names {unknown or 'no argument'}, and the model's forward takes {list(taken)}."
        )


def specified_dimensions(sample_dim: SampleDim) -> set[int] | None:
    """The dimensions that were told to hold samples, of whatever arguments; None where they are to be found."""
    if isinstance(sample_dim, Mapping):
        return {dim for dim in sample_dim.values() if dim is not None}
    return {sample_dim} if isinstance(sample_dim, int) else None


def require_one_dimension(sample_dim: SampleDim) -> None:
    """Raise where samples are not in one dimension of all inputs, as a pass of our own takes them (or in dim 0)."""
    told = specified_dimensions(sample_dim)
    if told is not None and (not told or len(told - {0}) > 1):
        raise InvalidArgumentError(
            "a one-shot measurement takes samples from one dimension of the inputs (or from dim 0), and sample_dim is "
            f"{sample_dim!r}: permute the inputs in the model's forward, or let training accumulate the Fisher."
        )


def with_shared_ones_hidden(model: nn.Module, inputs: Any, sample_dim: SampleDim) -> Any:
    """What a model is called with, of which the arguments that were told to hold no samples are not cut into any.

    Such as a mask of as many rows as there are samples. Where none holds any, they stay as they are.
    """
    if not isinstance(sample_dim, Mapping) or not specified_dimensions(sample_dim):
        return inputs
    without = {name for name, dim in sample_dim.items() if dim is None}
    if isinstance(inputs, Mapping):
        return {name: Shared(x) if name in without else x for name, x in inputs.items()}
    if not isinstance(inputs, (tuple, list)):
        return inputs
    names = list(signature(model.forward).parameters)[: len(inputs)]
    names += [""] * (len(inputs) - len(names))
    return tuple(Shared(x) if name in without else x for name, x in zip(names, inputs, strict=True))
