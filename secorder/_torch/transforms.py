"""Transforms of ``torch.func``."""

import torch

__all__ = ["inside_transform"]


def inside_transform() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, …) runs now."""
    return torch._C._functorch.peek_interpreter_stack() is not None
