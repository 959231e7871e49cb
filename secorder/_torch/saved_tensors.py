"""Tensors that autograd saves for backward: told to do otherwise (by checkpoints), or overwritten meanwhile."""

import torch

__all__ = ["is_overwritten_error", "saved_tensor_hooks_active"]


def saved_tensor_hooks_active() -> bool:
    """Whether something, such as an activation checkpoint, takes the tensors that autograd saves now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_overwritten_error(error: RuntimeError) -> bool:
    """Whether an error of autograd says that a saved tensor was changed in place."""
    return "modified by an inplace operation" in str(error)
