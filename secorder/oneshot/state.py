"""State that a model or a loss keeps in Python objects or in variables of its code: found, and restored.

A loss may count its calls, move a centre, feed a metric, append to a list; a model may fill a cache or own a random
generator. A measurement calls both many times, each time from the same state, and leaves the state that it found.
"""

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.modules import is_scripted, own_attributes, own_tensors, tables_of
from .._torch.pytree import elements, slots_of
from .restoring import (
    MAX_COMPARED,
    Restore,
    SavedTensor,
    of_attributes,
    of_cache,
    of_cell,
    of_dict,
    of_elements,
    of_length,
    of_numbers,
    of_variable,
)
from .user_code import CACHED, functions_of, global_names, is_foreign

#: Objects that are looked at, at most: who keeps more keeps a data set, not a state.
MAX_OBJECTS = 20_000

#: Containers of more elements are data, too: of a list, what was appended is taken off again.
MAX_ELEMENTS = 10_000

#: Levels from the roots on that other objects than containers are looked at, where levels are told.
OBJECTS = 2

_ATOMS = (str, bytes, int, float, complex, bool, type(None), types.ModuleType, types.CodeType, types.FrameType)

_METHODS = (types.FunctionType, classmethod, staticmethod, property, types.MemberDescriptorType)


class State:
    """The mutable state that some objects hold or lead to, as it was when this was made.

    Roots are functions, bound methods, partials, modules and other objects; what is ``known`` is somebody else's. Of an
    earlier state of the same roots (``base``), copies of tensors will do. With ``levels`` containers are looked at so
    far from the roots, other objects next to them alone, or ``objects`` far.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        known: Iterable[Any] = (),
        base: "State | None" = None,
        *,
        levels: int | None = None,
        objects: int = OBJECTS,
    ) -> None:
        self._base = base
        self._few = levels is not None
        roots = list(roots)
        held = [t for root in roots if isinstance(root, nn.Module) for t in own_tensors(root)]
        self._sharded = any(hasattr(t, "placements") for t in held)
        self._saved: dict[int, SavedTensor] = {}
        self._restores: list[Restore] = []
        self._slots: list[tuple[Tensor, Callable[[Any], None]]] = []  # where tensors are held
        self._exchanged: list[tuple[Callable[[Any], None], Tensor]] = []
        self._seen: dict[int, Any] = {id(x): x for x in known}  # kept: no other object may get the id
        waiting = deque((root, 0) for root in roots)
        while waiting and len(self._seen) < MAX_OBJECTS:
            here, level = waiting.popleft()
            if isinstance(here, _ATOMS) or id(here) in self._seen:
                continue
            self._seen[id(here)] = here
            further = self._taken(here, objects=levels is None or level < objects)
            waiting.extend([(x, level + 1) for x in further] if levels is None or level < levels else [])

    def restore(self) -> bool:
        """Put everything back; returns whether anything had been changed."""
        changed = [restore() for restore in self._restores]
        for put, value in self._exchanged:
            put(value)
        return any(changed)

    @contextmanager
    def exchanged(self, tensors: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside, other tensors are held in place of some, given by ``id``."""
        changed = [(held, put) for held, put in self._slots if id(held) in tensors]
        self._exchanged = [(put, tensors[id(held)]) for held, put in changed]
        try:
            for put, value in self._exchanged:
                put(value)
            yield
        finally:
            self._exchanged = []
            for held, put in changed:
                put(held)

    def _hold(self, held: Any, put: Callable[[Any], None]) -> None:
        if isinstance(held, Tensor):
            self._slots.append((held, put))

    def _taken(self, x: Any, *, objects: bool) -> Iterable[Any]:
        """Take down how to put an object back; returns what it leads to. Of no containers only if they are wanted."""
        if isinstance(x, Tensor):
            self._tensor(x)
        elif isinstance(x, nn.Module):
            return () if is_scripted(x) else self._module(x)
        elif isinstance(x, partial):
            return (x.func, *x.args, *x.keywords.values())
        elif isinstance(x, CACHED):
            self._restores.append(of_cache(x))
            return (x.__wrapped__,)
        elif isinstance(x, types.MethodType):
            return (x.__func__, x.__self__)
        elif isinstance(x, types.FunctionType):
            return self._function(x)
        elif isinstance(x, (dict, list, set, deque, bytearray)):
            return self._container(x)
        elif isinstance(x, (tuple, frozenset)):
            held = elements(x)
            return held if len(held) <= MAX_ELEMENTS else ()
        elif (restore := of_numbers(x)) is not None:
            self._restores.append(restore)
        elif isinstance(x, type):
            return self._class(x)
        elif objects and not is_foreign(type(x)):
            return self._object(x)
        return ()

    def _class(self, kind: type) -> Iterator[Any]:
        """What methods may keep on their class."""
        if is_foreign(kind):
            return
        for name, value in list(vars(kind).items()):
            if not name.startswith("__") and not isinstance(value, _METHODS):
                self._restores.append(of_variable(partial(vars(kind).get, name), partial(setattr, kind, name), value))
                yield value
        if issubclass(kind, torch.autograd.Function):  # whose methods are called on nothing
            yield from functions_of(kind)

    def _object(self, x: Any) -> Iterator[Any]:
        yield type(x)
        yield from self._container(vars(x)) if hasattr(x, "__dict__") else ()
        for name in slots_of(x):
            value, put = getattr(x, name), partial(object.__setattr__, x, name)
            self._restores.append(of_variable(partial(getattr, x, name, None), put, value))
            self._hold(value, put)
            yield value

    def _tensor(self, x: Tensor) -> None:
        if not x.is_leaf or x.is_inference() or x.is_meta or x.layout != torch.strided or x.is_nested:
            return
        if self._few and (x.numel() > MAX_COMPARED or isinstance(x, nn.Parameter)):
            return
        before = None if self._base is None else self._base._saved.get(id(x))
        saved = SavedTensor(x, None if before is None or before.changed() else before.values)
        self._saved[id(x)] = saved
        self._restores.append(saved.restore)

    def _module(self, module: nn.Module) -> Iterator[Any]:
        self._restores.append(of_attributes(module))
        if not self._sharded:  # FSDP exchanges parameters in the tables, as it gathers them
            self._restores += map(of_dict, tables_of(module))
        yield from own_attributes(module).values()
        for table in tables_of(module):
            yield from table.values()

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        if function.__module__ is not None and is_foreign(function):
            return
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield vars(function)
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self._restores.append(of_cell(cell, held))
            self._hold(held, partial(setattr, cell, "cell_contents"))
            yield held
        names, assigned = global_names(function.__code__)
        for name in names & function.__globals__.keys():
            held, put = function.__globals__[name], partial(function.__globals__.__setitem__, name)
            if name in assigned:
                self._restores.append(of_variable(partial(function.__globals__.get, name), put, held))
            self._hold(held, put)
            yield held

    def _container(self, x: Any) -> Iterable[Any]:
        if len(x) > MAX_ELEMENTS:
            if isinstance(x, list):
                self._restores.append(of_length(x))
            return ()
        mapping = isinstance(x, dict)
        self._restores.append(of_dict(x) if mapping else of_elements(x))
        for key, value in x.items() if mapping else enumerate(x) if isinstance(x, list) else ():
            self._hold(value, partial(x.__setitem__, key))
        return () if isinstance(x, bytearray) else list(x.values() if mapping else x)
