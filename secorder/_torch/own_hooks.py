"""Hooks of this library on the modules of a model: known as such, silenced together, left out of copies."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from .modules import forward_hook_dicts, forward_hooks, has_hooks, modules_in


class OwnHook:
    """A hook of the library's, silent while its owner's ``suspensions`` are above 0; a copied model's does nothing."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __reduce__(self) -> Any:
        return (partial, (_ignore,))


def _ignore(*_: Any) -> None:
    """What a copied model's hook does."""


class FirstHooks:  # a handle
    """Hooks on modules' calls that come before all others and get keyword arguments, until :meth:`remove`.

    What ``register_forward_hook(hook, prepend=True, with_kwargs=True)`` makes, at a fraction of the cost: they are put
    on and taken off at each step. Until then they keep the modules' tables alive.
    """

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: list[tuple[Any, dict[int, bool], int]] = []

    def put(self, hooks: Iterable[tuple[nn.Module, OwnHook]]) -> None:
        """Put each of the hooks on its module."""
        for module, hook in hooks:
            table: Any = module._forward_hooks
            with_kwargs, key = module._forward_hooks_with_kwargs, id(hook)
            self._places.append((table, with_kwargs, key))
            table[key], with_kwargs[key] = hook, True
            if len(table) > 1:
                table.move_to_end(key, last=False)

    def remove(self) -> None:
        """The hooks go."""
        for table, with_kwargs, key in self._places:
            table.pop(key, None)
            with_kwargs.pop(key, None)
        self._places.clear()


def is_own(hook: Any) -> bool:
    """Whether a hook on modules is the library's."""
    return isinstance(hook, OwnHook) or isinstance(getattr(hook, "__self__", None), Aside)


@contextmanager
def outputs_seen(
    modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, Any], None], *, first: bool = False
) -> Iterator[None]:
    """Tell ``see`` by name what each module returns inside; ``first``: before other hooks make something else of it."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, output)

    with ExitStack() as hooks:
        for name, module in modules:
            hooks.enter_context(module.register_forward_hook(hook(name), prepend=first))
        yield


@contextmanager
def added_hooks_removed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What forwards inside register on the modules is taken off them in the end, all but hooks of the library's.

    Such as those that a model puts on its parts when it is called for the first time, and remembers that it has.
    """
    first = RemovableHandle.next_id
    try:
        yield
    finally:
        for module in modules:
            if not has_hooks(module):
                continue
            tables = [table for name, table in vars(module).items() if "_hooks" in name and isinstance(table, dict)]
            hooks = [(key, x) for table in tables for key, x in table.items() if key >= first and callable(x)]
            for key in [key for key, x in hooks if not is_own(x)]:
                for table in tables:
                    table.pop(key, None)


class Aside:  # a handle
    """From the middle of a module's call to its end the module has no hook of the library's.

    For modules whose own forward asks whether they have hooks, and computes otherwise if so.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept = [(hooks, dict(hooks)) for hooks in forward_hook_dicts(module)]
        for hooks, before in self._kept:
            for key in [key for key, hook in before.items() if isinstance(hook, OwnHook)]:
                del hooks[key]
        self._handle = register_module_forward_hook(self._ended, always_call=True)

    def _ended(self, module: nn.Module, *_: Any) -> None:
        if module is self._module:
            self.remove()

    def remove(self) -> None:
        """The hooks are back."""
        self._handle.remove()
        for hooks, before in self._kept:
            now = {key: hook for key, hook in hooks.items() if key not in before}
            gone = [key for key, hook in before.items() if key not in hooks and not isinstance(hook, OwnHook)]
            hooks.clear()
            hooks.update({key: hook for key, hook in before.items() if key not in gone} | now)
        self._kept = []


def computes_by_its_hooks(module: nn.Module) -> bool:
    """Whether the module's forward depends on whether it has hooks: the fused path of an encoder layer."""
    return isinstance(module, nn.TransformerEncoderLayer) and not module.training


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Every owner of hooks on the model, whoever it is, is suspended inside."""
    hooks = [hook for module in modules_in(model) if has_hooks(module) for hook in forward_hooks(module)]
    owners = {id(hook.owner): hook.owner for hook in hooks if isinstance(hook, OwnHook)}
    for owner in owners.values():
        owner.suspensions += 1
    try:
        yield
    finally:
        for owner in owners.values():
            owner.suspensions -= 1
