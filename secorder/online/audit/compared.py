"""The numbers that the audit compares: one of each parameter, or of a weight and its bias together."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ...layers.one_by_one import Vectors


class Number(NamedTuple):
    """What one side of the identity is a number of."""

    parameter: Tensor  #: a weight, mostly
    bias: Tensor | None  #: that is one number with it
    vectors: Vectors  #: the random ones


def are_one(trained: Mapping[str, Tensor]) -> bool:
    """Whether these parameters of a layer are a weight and its bias, whose gradients are compared as one number."""
    if [*trained] != ["weight", "bias"] or trained["weight"].dim() < 2:
        return False
    return trained["bias"].shape == trained["weight"].shape[:1]


def count_numbers(parameters: Mapping[str, Tensor]) -> int:
    """How many numbers are compared for the parameters of a layer."""
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    return 1 if are_one(trained) else len(trained)
