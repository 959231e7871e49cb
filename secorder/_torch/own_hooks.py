"""Hooks of this library on the modules of a model: known as such, silenced together, left out of copies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .compiler import Uncompiled
from .modules import forward_hooks

__all__ = ["OwnHook", "suspended"]


class OwnHook:
    """A hook of the library's; copies and pickles of the model get one that does nothing.

    Args:
        owner: what the hook belongs to; has a number ``suspensions``, and its hooks do nothing while that is above 0.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self._run = Uncompiled(self.run)

    def __call__(self, *args: Any) -> None:
        """What PyTorch calls."""
        self._run(*args)

    def run(self, *args: Any) -> None:
        """What the hook does: as it stands, also in a compiled model."""

    def __reduce__(self) -> Any:
        return (_no_hook, ())


def _ignore(*_: Any) -> None:
    """What a copied model's hook does."""


def _no_hook() -> Callable[..., None]:
    return _ignore


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Every owner of hooks on the model, whoever it is, is suspended inside."""
    hooks = [hook for module in model.modules() for hook in forward_hooks(module)]
    owners = {id(hook.owner): hook.owner for hook in hooks if isinstance(hook, OwnHook)}
    for owner in owners.values():
        owner.suspensions += 1
    try:
        yield
    finally:
        for owner in owners.values():
            owner.suspensions -= 1
