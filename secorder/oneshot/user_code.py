"""What the user's code refers to beyond its arguments, and may keep state in: variables, classes, methods."""

import dis
import sys
import types
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from torch import nn

#: The type of functions that remember what they returned.
CACHED = type(lru_cache(id))

_FOREIGN = frozenset({
    "torch", "numpy", "builtins", "logging", "threading", "io", "_io", "weakref", "typing", "collections", "functools",
    "re", "json", "datetime", "pathlib", "contextlib", "abc", "enum", "decimal", "fractions", "inspect", "secorder",
})  # fmt: skip


def is_foreign(kind: Any) -> bool:
    """Whether a type or function is of a library that no loss keeps a state in."""
    return (getattr(kind, "__module__", None) or "builtins").partition(".")[0] in _FOREIGN


def code_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The classes that modules are of, and their methods, but for those of installed libraries.

    They may keep a state on the class, in variables of the script, and in what they close over.
    """
    kinds = dict.fromkeys(kind for m in modules for kind in type(m).__mro__)
    own = [kind for kind in kinds if not (is_foreign(kind) or _is_installed(kind))]
    return [*own, *(function for kind in own for function in functions_of(kind))]


def _is_installed(kind: type) -> bool:
    path = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def functions_of(kind: type) -> Iterator[Any]:
    """The functions that a class defines, those of its properties among them."""
    for value in vars(kind).values():
        if isinstance(value, property):
            yield from (function for function in (value.fget, value.fset) if function is not None)
        elif isinstance(value, (types.FunctionType, staticmethod, classmethod, CACHED)):
            yield getattr(value, "__func__", value)


@lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names that a function, and those in it, read from its module, and those that it assigns there."""
    names, assigned = set(code.co_names), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            assigned.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, also = global_names(inner)
            names, assigned = names | more, assigned | also
    return names, assigned
