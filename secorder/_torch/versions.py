"""Whether a tensor is unchanged: by its memory and its version counter, which in-place operations increase."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

_VERSION = attrgetter("_version")


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two dense tensors begin at the same place in memory: ``p.data = …`` gives a parameter another one."""
    return x.layout is not torch.strided or x.data_ptr() == y.data_ptr()


def version(tensor: Tensor) -> int:
    """How often a tensor, or one that shares its memory, was changed in place.

    Inference tensors do not count (nor can they be changed in place where gradients are taken): always 0.
    """
    try:
        return tensor._version
    except RuntimeError:
        if tensor.is_inference():
            return 0
        raise


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The :func:`version` of each."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return [version(t) for t in tensors]
