"""Modules: their hooks, where they hold parameters and buffers, and which forward they run."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter, is_
from threading import get_ident
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .pytree import once_each
from .surroundings import assigned


class Place(NamedTuple):
    """Where a module holds a tensor that its forward reads."""

    holder: Any  #: a dict or list of the module's
    key: Any  #: in the holder: the tensor's name or index
    value: Tensor  #: what it holds

    def held(self) -> Tensor:
        """What it holds now."""
        found: Tensor = self.holder[self.key]
        return found

    def put(self, value: Any) -> None:
        """Hold something else there: of any kind, which ``setattr`` would refuse."""
        self.holder[self.key] = value


def put_copies(places: Iterable[Place]) -> None:
    """Hold copies of the values of places there; what is one tensor stays one."""
    copied = once_each(lambda tensor: tensor.detach().clone())
    for place in places:
        place.put(copied(place.value))


def put_back(places: Iterable[Place]) -> None:
    """Hold the values of places there again."""
    for place in places:
        place.put(place.value)


@contextmanager
def holding(values: Sequence[tuple[Place, Tensor]]) -> Iterator[None]:
    """Inside, other tensors are held in some places."""
    try:
        for place, value in values:
            place.put(value)
        yield
    finally:
        put_back(place for place, _ in values)


def parameter_places(module: nn.Module) -> list[Place]:
    """Where the module itself holds parameters: recurrent ones keep a list besides, which their forward reads."""
    places = [Place(module._parameters, name, p) for name, p in module._parameters.items() if p is not None]
    if isinstance(module, nn.RNNBase):
        flat: list[Any] = module._flat_weights
        places += [Place(flat, index, w) for index, w in enumerate(flat) if w is not None]
    return places


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that the module itself holds, by name."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def parameters_with(module: nn.Module, inner: str = "") -> dict[str, nn.Parameter]:
    """What ``named_parameters`` tells of a module itself and of one submodule, without a walk through all of them."""
    if is_scripted(module):
        return dict(module.named_parameters(recurse=False))
    under = module._modules.get(inner)
    found = own_parameters(module)
    if not found and under is None:
        return found
    if under is not None:
        found |= {f"{inner}.{name}": p for name, p in under.named_parameters()}
    first: dict[int, str] = {}
    for name, p in found.items():
        first.setdefault(id(p), name)
    return {name: found[name] for name in first.values()}


def holds(module: nn.Module, parameters: Mapping[str, Tensor]) -> bool:
    """Whether these are what a module itself holds as its parameters of their names."""
    held = module._parameters
    return all(map(is_, map(held.get, parameters), parameters.values()))


#: What a module itself holds as its parameters, by name.
parameter_table: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_parameters")


def held_parameter(module: nn.Module, name: str) -> Any:
    """What a module holds as its parameter of a name now (``"weight"``, ``"0.weight"``); None where it holds none."""
    holder, local = _holder(module, name)
    return None if holder is None else _entry(holder._parameters, local)


def _holder(module: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The module that is to hold a parameter of a name, if there is one, and the parameter's name there."""
    *path, local = name.split(".")
    for part in path:
        found = _entry(module._modules, part)
        if found is None:
            return None, local
        module = found
    return module, local


def _entry(table: Any, name: str) -> Any:
    """What a module's table holds; those of a scripted one are no dicts, and have no ``get``."""
    if name not in table:
        return None
    return table[name]


def buffer_places(module: nn.Module) -> list[Place]:
    """Where the module itself holds buffers."""
    return [Place(module._buffers, name, b) for name, b in module._buffers.items() if b is not None]


def parameters_replaced(module: nn.Module, parameters: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Inside, the module's own parameters of these names are other tensors."""
    own = own_parameters(module)
    return holding([(Place(module._parameters, name, own[name]), value) for name, value in parameters.items()])


def has_hooks(module: nn.Module) -> bool:
    """Whether the module calls any hook, on what passes or on gradients."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


def forward_hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    """Where a module holds the hooks that it calls after and before its forward."""
    return [module._forward_hooks, module._forward_pre_hooks]


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that the module calls after and before its forward."""
    return [hook for hooks in forward_hook_dicts(module) for hook in hooks.values()]


def hooks_on_all_modules() -> list[Any]:
    """The hooks that every module calls after and before its forward."""
    found = torch.nn.modules.module
    return [*found._global_forward_hooks.values(), *found._global_forward_pre_hooks.values()]


def backward_hooks_on_all_modules() -> list[Any]:
    """The hooks that every module calls on gradients."""
    found = torch.nn.modules.module
    return [*found._global_backward_hooks.values(), *found._global_backward_pre_hooks.values()]


@contextmanager
def forward_hooks_removed(modules: Iterable[nn.Module], unwanted: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, the modules do not call those of their :func:`forward_hooks` that are unwanted."""
    kept: list[tuple[Any, dict[int, Any]]] = []
    try:
        for module in modules:
            for hooks in forward_hook_dicts(module):
                kept.append((hooks, dict(hooks)))
                for key in [key for key, hook in hooks.items() if unwanted(hook)]:
                    del hooks[key]
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


@contextmanager
def gradient_hooks_removed(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, nothing runs that was registered with ``register_hook`` on the parameters."""
    with _emptied([hooks for p in parameters if (hooks := p._backward_hooks)]):
        yield


@contextmanager
def backward_hooks_removed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, nothing runs that was registered for the backward of the modules."""
    with _emptied([hooks for module in modules for hooks in backward_hook_dicts(module)]):
        yield


@contextmanager
def _emptied(tables: list[Any]) -> Iterator[None]:
    """Inside, tables of hooks are empty."""
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, content in zip(tables, kept, strict=True):
            table.update(content)


def convolution_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """What the module's forward adds at each side of its input, as ``F.pad`` takes it (last dimension first).

    By the attributes as they are now; in modes other than zeros the forward itself goes by what they were at first.
    """
    if module.padding_mode != "zeros":
        return list(module._reversed_padding_repeated_twice)
    sides: list[int] = []
    for dim, (kernel, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if isinstance(module.padding, str):  # "same" adds the odd one behind, "valid" nothing
            total = dilation * (kernel - 1) if module.padding == "same" else 0
            sides = [total // 2, total - total // 2, *sides]
        else:
            padding: Any = module.padding
            one = int(padding[dim % len(padding)]) if isinstance(padding, (tuple, list)) else int(padding)
            sides = [one, one, *sides]
    return sides


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's forward is the one of ``kind``, a base of its type: nothing overrides it."""
    own, methods = type(module), ("forward", "_conv_forward")
    same = own is kind or all(getattr(own, name, None) is getattr(kind, name, None) for name in methods)
    return same and vars(module).keys().isdisjoint(methods)


def is_running(module: nn.Module) -> bool:
    """Whether another call of the module, besides the innermost, runs in this thread: it calls itself."""
    calls = _calls(module, sys._getframe(1))
    next(calls, None)
    return next(calls, None) is not None


def threads_running(module: nn.Module) -> set[int]:
    """The other threads in which a call of the module runs now."""
    frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != get_ident()}
    return {thread for thread, frame in frames.items() if any(True for _ in _calls(module, frame))}


def _calls(module: nn.Module, frame: FrameType | None) -> Iterator[FrameType]:
    """The calls of a module that a frame is in, the innermost first."""
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            yield frame
        frame = frame.f_back


_CALL = nn.Module._call_impl.__code__


class kept_out_of_copies:  # a handle, as hooks have them
    """Copies and pickles of a module are made without the hooks of the library that it has, until :meth:`remove`.

    By an attribute of the instance, which the copies do not have either.
    """

    def __init__(self, module: nn.Module, own: type) -> None:
        self._module = module
        held = vars(module)
        before = held.get("__getstate__")
        self._users: list[kept_out_of_copies] = before.users if isinstance(before, _State) else []
        if not self._users:
            held["__getstate__"] = _State(module, own, self._users, before)
        self._users.append(self)

    def remove(self) -> None:
        """The module is copied as it is, unless another one of these is left."""
        if self in self._users:
            self._users.remove(self)
            state = vars(self._module).get("__getstate__")
            if not self._users and isinstance(state, _State):
                state.restore()


class _State:
    """What a module is pickled and copied by."""

    def __init__(self, module: nn.Module, own: type, users: list[Any], before: Any) -> None:
        self.module, self.own, self.users, self.before = module, own, users, before

    def restore(self) -> None:
        if self.before is None:
            del vars(self.module)["__getstate__"]
        else:
            vars(self.module)["__getstate__"] = self.before

    def __call__(self) -> Any:
        module = self.module
        kind: Any = type(module)
        if self.before is not None:
            state = self.before()
        else:
            state = kind.__getstate__(module) if hasattr(kind, "__getstate__") else dict(vars(module))
        if not isinstance(state, dict):
            return state
        state = {name: value for name, value in state.items() if name != "__getstate__"}
        hooks = [h for name in ("_forward_hooks", "_forward_pre_hooks") for h in vars(module)[name].items()]
        ids = {key for key, hook in hooks if isinstance(hook, self.own)}
        for name in [name for name in state if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]:
            if isinstance(state.get(name), dict):
                state[name] = type(state[name])((k, v) for k, v in state[name].items() if k not in ids)
        return state


#: What a module keeps for PyTorch itself.
_OWN = frozenset(vars(nn.Module()))


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What was stored on a module beyond parameters, buffers, modules and hooks."""
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers that a module itself holds (``parameters(recurse=False)`` takes far longer)."""
    if is_scripted(module):
        return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [t for table in (module._parameters, module._buffers) for t in table.values() if t is not None]


def tables_of(module: nn.Module) -> list[dict[str, Any]]:
    """Where a module keeps its parameters, buffers and modules, by name."""
    return [module._parameters, module._buffers, module._modules]


def backward_hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    """Where a module holds the hooks that it calls on gradients."""
    return [hooks for hooks in (module._backward_hooks, module._backward_pre_hooks) if hooks]


def backward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that the module calls on gradients."""
    return [hook for hooks in backward_hook_dicts(module) for hook in hooks.values()]


def is_scripted(module: nn.Module) -> bool:
    """Whether TorchScript runs the module: nothing can be hooked or replaced in it."""
    return isinstance(module, torch.jit.ScriptModule)


def batch_normalisation(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that normalise by the statistics of the batch of now, and have running ones."""
    kinds = nn.modules.batchnorm._BatchNorm
    return tuple(m for m in model.modules() if isinstance(m, kinds) and m.training and m.running_mean is not None)


def observers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of fake quantisation that take its ranges from the batch of now."""
    flags = [(m, _entry(m._buffers, "observer_enabled")) for m in model.modules()]
    return tuple(m for m, flag in flags if flag is not None and bool(flag.any()))


def observe_nothing(modules: Iterable[nn.Module]) -> None:
    """Let fake quantisation go by the ranges that it has, where buffers are copies that nobody keeps."""
    for module in modules:
        flag = _entry(module._buffers, "observer_enabled")
        if flag is not None:
            module._buffers["observer_enabled"] = torch.zeros_like(flag)


def evaluating(model: nn.Module, but: Collection[nn.Module] = ()) -> AbstractContextManager[None]:
    """Inside, all modules but some are in eval mode."""
    return assigned([m for m in model.modules() if m.training and m not in but], training=False)


def constant_in_place_of(module: nn.Module, name: str) -> Tensor | None:
    """What a module holds by a parameter's name (``"weight"``, ``"0.weight"``), if it is no parameter and constant.

    ``torch.func.functional_call`` puts such tensors where parameters are, others among buffers or plain attributes.
    """
    holder, local = _holder(module, name)
    if holder is None:
        return None
    found = {**vars(holder), **holder._buffers, **holder._parameters}.get(local)
    if not isinstance(found, Tensor) or isinstance(found, nn.Parameter) or found.requires_grad:
        return None
    return found


_NAMED_MODULES = nn.Module.named_modules


def modules_in(module: nn.Module) -> list[nn.Module]:
    """Those of ``module.modules()``, in that order, without the nest of generators that it goes through them by."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        here = waiting.pop()
        if here is not None and here not in found:
            if type(here).named_modules is not _NAMED_MODULES:  # a kind that tells of others
                return list(module.modules())
            found[here] = None
            waiting.extend(reversed(here._modules.values()))
    return list(found)
