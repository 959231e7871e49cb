"""Version counters of tensors, which in-place operations count up."""

from torch import Tensor

__all__ = ["version"]


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
