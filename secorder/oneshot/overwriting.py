"""Losses that change their arguments in place, which a measurement calls many times."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .._torch.pytree import map_tensors, tensors_in
from .._torch.versions import version


class LossOverwrites(Exception):
    """The loss changes the output, or the targets, that it is given: it must be given copies."""


def on_copies(loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The loss, of copies of the tensors in output and targets."""

    @wraps(loss_fn, updated=())
    def wrapped(output: Any, targets: Any) -> Tensor:
        return loss_fn(*map_tensors(torch.clone, (output, targets)))

    return wrapped


def versions(tree: Any) -> list[int]:
    """How often each of the tensors has been changed in place."""
    return [version(t) for t in tensors_in(tree)]
