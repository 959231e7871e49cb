"""Inputs, outputs and targets as users pass them: tensors in any nest of containers and objects.

What PyTorch's own pytrees know (list, tuple, dict, deque, what was registered) is theirs. Beyond that, any mapping and
any object whose attributes hold tensors, such as a batch class or a dataclass, is taken apart: a copy gets other
attributes, without a call of its ``__init__``. Modules, types, functions, and what cannot be copied, are leaves.
"""

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree

#: Not to be taken apart.
_LEAVES = (
    str, bytes, int, float, complex, type(None), type, nn.Module, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CodeType, types.FrameType,
)  # fmt: skip

_PLAIN = frozenset((Tensor, nn.Parameter))

#: Objects in a list of an object's are no batches: they are what it works with, such as the layers of a cache.
_Where = Literal["outside", "in an object", "in a sequence of an object"]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nested structure, depth first; of a structure that is in it twice, once."""
    if isinstance(tree, Tensor):
        return iter((tree,))
    if type(tree) is tuple and _PLAIN.issuperset(map(type, tree)):  # as most modules are called
        return iter(tree)
    return _tensors(tree, {})


def _tensors(tree: Any, seen: dict[int, Any], where: _Where = "outside") -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    parts = None if id(tree) in seen else _parts(tree, where)
    if parts is None:
        return
    seen[id(tree)] = tree  # kept: another one may not get its id meanwhile
    found = (t for child in parts.children for t in _tensors(child, seen, parts.where))
    if parts.rebuilt is not None:
        yield from found
    elif (tensors := list(found)) and _copied(tree) is not None:
        yield from tensors


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same structure with every tensor replaced by ``function(tensor)``, in :func:`tensors_in` order.

    A structure that is in it twice stays one. Objects that hold no tensor are the same ones.
    """
    return _mapped(function, tree, {})


def _mapped(
    function: Callable[[Tensor], Any], tree: Any, seen: dict[int, tuple[Any, Any]], where: _Where = "outside"
) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if id(tree) in seen:
        return seen[id(tree)][1]
    parts = _parts(tree, where)
    if parts is None:
        return tree
    seen[id(tree)] = (tree, tree)  # for a container that contains itself
    if parts.rebuilt is not None:
        result = parts.rebuilt([_mapped(function, child, seen, parts.where) for child in parts.children])
        seen[id(tree)] = (tree, result)
        return result
    inside = {id(tree): tree}
    found = (t for child in parts.children for t in _tensors(child, inside, parts.where))
    if next(found, None) is None:
        return tree
    result = _copied(tree)
    if result is None:
        for _ in found:  # so that all of its inside is known
            pass
        for key, value in inside.items():
            seen.setdefault(key, (value, value))
        return tree
    seen[id(tree)] = (tree, result)
    for name, value in zip(parts.names, parts.children, strict=True):
        _set(result, name, _mapped(function, value, seen, parts.where))
    return result


def attributes_of(tree: Any) -> dict[str, Any]:
    """What an object holds, by the attributes' names; nothing of a container, a tensor, or a leaf."""
    parts = None if isinstance(tree, Tensor) else _parts_anywhere(tree)
    return {} if parts is None or parts.rebuilt is not None else dict(zip(parts.names, parts.children, strict=True))


#: What became of tensors, by ``id``; with the tensor itself, so that another one may not get its id meanwhile.
Made = dict[int, tuple[Tensor, Tensor]]


def once_each(function: Callable[[Tensor], Tensor], made: Made | None = None) -> Callable[[Tensor], Tensor]:
    """The function, called once for each tensor: what is one tensor stays one, however often it comes.

    Attention, for one, asks whether its query is its key. ``made`` receives what became of each tensor.
    """
    made = {} if made is None else made

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = tensor, function(tensor)
        return made[id(tensor)][1]

    return once


class _Parts(NamedTuple):
    """What a structure holds."""

    children: list[Any]  #: what it holds, each perhaps a structure
    #: makes a container of the same kind from as many others; None for an object
    rebuilt: Callable[[list[Any]], Any] | None
    names: Sequence[str] = ()  #: of an object, the attributes that hold them
    where: _Where = "outside"  #: the children are


def elements(held: Any) -> list[Any]:
    """What a list, tuple or set holds, also one of a type that tells no length, or iterates in its own way."""
    kind: Any = next(kind for kind in (list, tuple, set, frozenset) if isinstance(held, kind))
    return list(kind.__iter__(held))


def _parts(tree: Any, where: _Where) -> _Parts | None:
    """Take a structure apart; None for a leaf."""
    parts = _parts_anywhere(tree)
    if parts is None or (parts.rebuilt is None and where == "in a sequence of an object"):
        return None
    if parts.rebuilt is None:
        return parts._replace(where="in an object")
    sequence = where == "in an object" and isinstance(tree, (list, tuple))
    return parts._replace(where="in a sequence of an object" if sequence else where)


def _parts_anywhere(tree: Any) -> _Parts | None:
    kind = type(tree)
    if kind is list or kind is tuple:
        return _Parts(list(tree), kind)
    if kind is dict:
        keys = list(tree)
        return _Parts(list(tree.values()), lambda values: dict(zip(keys, values, strict=True)))
    try:
        if isinstance(tree, _LEAVES):
            return None
        parts = _container(tree)
        if parts is None:
            names = [*getattr(tree, "__dict__", ()), *slots_of(tree)]
            return _Parts([_get(tree, name) for name in names], None, names) if names else None
        assert parts.rebuilt is not None
        parts.rebuilt(parts.children)  # a trial
        return parts
    except Exception:  # an object of the user's that is not what it looks like
        return None


def _container(tree: Any) -> _Parts | None:
    """The parts of containers beyond the plain ones."""
    kind = type(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return _Parts(list(tree), lambda values: tuple.__new__(kind, values))
    children, spec = _pytree.tree_flatten(tree, is_leaf=lambda node: node is not tree)
    if not (len(children) == 1 and children[0] is tree):
        return _Parts(children, lambda values: _pytree.tree_unflatten(values, spec))
    if isinstance(tree, (tuple, list)):
        return _Parts(list(tree), kind)
    if isinstance(tree, dict):
        keys = list(tree)
        return _Parts([tree[key] for key in keys], lambda values: _dict(tree, zip(keys, values, strict=True)))
    if isinstance(tree, Mapping) and not hasattr(tree, "__dict__") and not slots_of(tree):  # such as a mappingproxy
        keys, anew = list(tree), cast(Callable[[dict[Any, Any]], Any], kind)
        return _Parts([tree[key] for key in keys], lambda values: anew(dict(zip(keys, values, strict=True))))
    return None


def _dict(tree: dict[Any, Any], items: Iterable[tuple[Any, Any]]) -> Any:
    result = copy.copy(tree)
    for key, value in items:
        result[key] = value
    return result


def slots_of(tree: Any) -> list[str]:
    """The ``__slots__`` of an object's type that hold something."""
    found = []
    for kind in type(tree).__mro__:
        declared = vars(kind).get("__slots__", ())
        for name in (declared,) if isinstance(declared, str) else declared:
            own = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if own not in ("__dict__", "__weakref__") and hasattr(tree, own):
                found.append(own)
    return found


def _get(tree: Any, name: str) -> Any:
    held = getattr(tree, "__dict__", {})
    return held[name] if name in held else getattr(tree, name)


def _set(tree: Any, name: str, value: Any) -> None:
    """Past properties, and whether the object is frozen or not."""
    held = getattr(tree, "__dict__", {})
    if name in held:
        held[name] = value
    else:
        object.__setattr__(tree, name, value)


def _copied(tree: Any) -> Any:
    """Another object with the same attributes; None where there is no such thing."""
    try:
        result = copy.copy(tree)
        if result is tree or type(result) is not type(tree):
            return None
        for name in [*getattr(tree, "__dict__", ()), *slots_of(tree)]:
            _set(result, name, _get(tree, name))
        return result
    except Exception:
        return None


class Shared:
    """An argument that holds no samples, whatever its shape: no structure of tensors until the model is called."""

    def __init__(self, value: Any) -> None:
        def get() -> Any:  # a function's own tensors are not looked for
            return map_tensors(once_each(torch.clone), value)

        self.get: Callable[[], Any] = get


def _shown(argument: Any) -> Any:
    return argument.get() if type(argument) is Shared else argument


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``, ``model(*inputs)`` for a tuple or list, ``model(**inputs)`` for a mapping."""
    if isinstance(inputs, Mapping):
        return model(**{name: _shown(x) for name, x in inputs.items()})
    if isinstance(inputs, (tuple, list)):
        return model(*map(_shown, inputs))
    return model(inputs)
