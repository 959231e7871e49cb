"""What hangs on a module: its hooks, where it holds parameters and buffers, which forward it computes by."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Place",
    "backward_hooks",
    "buffer_places",
    "computes_as",
    "convolution_padding",
    "forward_hooks",
    "forward_hooks_removed",
    "gradient_hooks_removed",
    "is_scripted",
    "own_attributes",
    "parameter_places",
    "parameters_replaced",
    "tables_of",
]


class Place(NamedTuple):
    """Where a module holds a tensor that its forward reads.

    Attributes:
        holder: a dict or list of the module's.
        key: in the holder: the tensor's name or index.
        value: what it holds.
    """

    holder: Any
    key: Any
    value: Tensor

    def put(self, value: Tensor) -> None:
        """Hold another tensor there: of any kind, which ``setattr`` would refuse."""
        self.holder[self.key] = value


def parameter_places(module: nn.Module) -> list[Place]:
    """Where the module itself holds parameters: recurrent ones keep a list besides, which their forward reads."""
    places = [Place(module._parameters, name, p) for name, p in module._parameters.items() if p is not None]
    if isinstance(module, nn.RNNBase):
        flat: list[Any] = module._flat_weights
        places += [Place(flat, index, w) for index, w in enumerate(flat) if w is not None]
    return places


def buffer_places(module: nn.Module) -> list[Place]:
    """Where the module itself holds buffers."""
    return [Place(module._buffers, name, b) for name, b in module._buffers.items() if b is not None]


@contextmanager
def parameters_replaced(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module's own parameters of these names are other tensors."""
    own = dict(module._parameters)
    try:
        module._parameters.update(parameters)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(own)


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that the module calls after and before its forward."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


@contextmanager
def forward_hooks_removed(modules: Iterable[nn.Module], unwanted: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, the modules do not call those of their :func:`forward_hooks` that are unwanted."""
    kept: list[tuple[Any, dict[int, Any]]] = []
    try:
        for module in modules:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
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
    hooks: list[Any] = [p._backward_hooks for p in parameters if p._backward_hooks]
    kept = [dict(h) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, content in zip(hooks, kept, strict=True):
            h.update(content)


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
    return not any(
        getattr(type(module), method, None) is not getattr(kind, method, None) or method in vars(module)
        for method in ("forward", "_conv_forward")
    )


#: What a module keeps for PyTorch itself.
_OWN = frozenset(vars(nn.Module()))


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What was stored on a module beyond parameters, buffers, modules and hooks."""
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def tables_of(module: nn.Module) -> list[dict[str, Any]]:
    """Where a module keeps its parameters, buffers and modules, by name."""
    return [module._parameters, module._buffers, module._modules]


def backward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that the module calls on gradients."""
    return [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]


def is_scripted(module: nn.Module) -> bool:
    """Whether TorchScript runs the module: nothing can be hooked or replaced in it."""
    return isinstance(module, torch.jit.ScriptModule)
