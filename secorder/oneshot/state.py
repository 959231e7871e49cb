"""What a model or a loss keeps in Python objects, or in what its code refers to: found, and put back as it was.

A loss may count its calls, move a centre, feed a metric, append to a list; a model may fill a cache or own a random
generator. A measurement calls both many times, each time from the same state, and leaves the state that it found.
"""

import dis
import io
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.modules import is_scripted, own_attributes, own_tensors, tables_of
from .._torch.versions import version

__all__ = ["State", "code_of", "same", "used_up"]

#: Objects that are looked at, at most: who keeps more keeps a data set, not a state.
MAX_OBJECTS = 20_000

#: Containers of more elements are data, too: of a list, what was appended is taken off again.
MAX_ELEMENTS = 10_000

#: Elements of a tensor that are compared one by one, since changes through ``.data`` are not counted.
MAX_COMPARED = 1_000_000

#: Levels from the roots on that other objects than containers are looked at, where levels are told.
OBJECTS = 2

_ATOMS = (str, bytes, int, float, complex, bool, type(None), types.ModuleType, types.CodeType, types.FrameType)
_FOREIGN = frozenset({
    "torch", "numpy", "builtins", "logging", "threading", "io", "_io", "weakref", "typing", "collections", "functools",
    "re", "json", "datetime", "pathlib", "contextlib", "abc", "enum", "decimal", "fractions", "inspect", "secorder",
})  # fmt: skip

#: Functions that remember what they returned.
_CACHED = type(lru_cache(id))

_METHODS = (types.FunctionType, classmethod, staticmethod, property, types.MemberDescriptorType)


def _foreign(kind: Any) -> bool:
    """Whether a type or function is of a library that no loss keeps a state in."""
    return (getattr(kind, "__module__", None) or "builtins").partition(".")[0] in _FOREIGN


def code_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The classes that modules are of, and their methods, but for those of installed libraries.

    They may keep a state on the class, in variables of the script, and in what they close over.
    """
    kinds = dict.fromkeys(kind for m in modules for kind in type(m).__mro__)
    own = [kind for kind in kinds if not (_foreign(kind) or _installed(kind))]
    return [*own, *(function for kind in own for function in _functions_of(kind))]


def _installed(kind: type) -> bool:
    path = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def _functions_of(kind: type) -> Iterator[Any]:
    for value in vars(kind).values():
        if isinstance(value, property):
            yield from (function for function in (value.fget, value.fset) if function is not None)
        elif isinstance(value, (types.FunctionType, staticmethod, classmethod, _CACHED)):
            yield getattr(value, "__func__", value)


def used_up(x: Any) -> bool:
    """Whether taking from an object cannot be put back: a generator, the iterator of a data loader; not one's own."""
    own = hasattr(x, "__dict__") and not _foreign(type(x))
    return isinstance(x, Iterator) and not own and not isinstance(x, io.IOBase)


class State:
    """The mutable state that some objects hold or lead to, as it was when this was made.

    Args:
        roots: functions, bound methods, partials, modules and other objects.
        known: objects that are not to be looked at: their state is somebody else's.
        base: an earlier state of the same roots, whose copies of tensors will do.
        levels: how far from the roots containers are looked at, and other objects only next to the roots; by default
            both are however far they are.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        known: Iterable[Any] = (),
        base: "State | None" = None,
        *,
        levels: int | None = None,
    ) -> None:
        self._base = base
        self._few = levels is not None
        roots = list(roots)
        held = [t for root in roots if isinstance(root, nn.Module) for t in own_tensors(root)]
        self._sharded = any(hasattr(t, "placements") for t in held)
        self._saved: dict[int, tuple[Tensor, list[int]]] = {}
        self._restores: list[Callable[[], bool]] = []  # each tells whether there was anything to put back
        self._slots: list[tuple[Tensor, Callable[[Any], None]]] = []  # where tensors are held
        self._exchanged: list[tuple[Callable[[Any], None], Tensor]] = []
        self._seen: dict[int, Any] = {id(x): x for x in known}  # kept: no other object may get the id
        waiting = deque((root, 0) for root in roots)
        while waiting and len(self._seen) < MAX_OBJECTS:
            here, level = waiting.popleft()
            if isinstance(here, _ATOMS) or id(here) in self._seen:
                continue
            self._seen[id(here)] = here
            further = self._taken(here, objects=levels is None or level < OBJECTS)
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
        elif isinstance(x, _CACHED):
            self._restores.append(partial(_forget, x, x.cache_info().misses))
            return (x.__wrapped__,)
        elif isinstance(x, types.MethodType):
            return (x.__func__, x.__self__)
        elif isinstance(x, types.FunctionType):
            return self._function(x)
        elif isinstance(x, (dict, list, set, deque, bytearray)):
            return self._container(x)
        elif isinstance(x, (tuple, frozenset)):
            return x if len(x) <= MAX_ELEMENTS else ()
        elif (generator := _generator(x)) is not None:
            self._restores.append(generator)
        elif isinstance(x, type):
            return self._class(x)
        elif objects and not _foreign(type(x)):
            return self._object(x)
        return ()

    def _class(self, kind: type) -> Iterator[Any]:
        """What methods may keep on their class."""
        if _foreign(kind):
            return
        for name, value in list(vars(kind).items()):
            if not name.startswith("__") and not isinstance(value, _METHODS):
                put = partial(setattr, kind, name)
                self._restores.append(partial(_reset, partial(vars(kind).get, name), put, value))
                yield value
        if issubclass(kind, torch.autograd.Function):  # whose methods are called on nothing
            yield from _functions_of(kind)

    def _object(self, x: Any) -> Iterator[Any]:
        yield type(x)
        yield from self._container(vars(x)) if hasattr(x, "__dict__") else ()
        for kind in type(x).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if not name.startswith("__") and hasattr(x, name):
                    value = getattr(x, name)
                    self._restores.append(
                        partial(_reset, partial(getattr, x, name, None), partial(object.__setattr__, x, name), value)
                    )
                    self._hold(value, partial(object.__setattr__, x, name))
                    yield value

    def _tensor(self, x: Tensor) -> None:
        if not x.is_leaf or x.is_inference() or x.is_meta or x.layout != torch.strided or x.is_nested:
            return
        if self._few and (x.numel() > MAX_COMPARED or isinstance(x, nn.Parameter)):
            return
        saved = self._base.unchanged(x) if self._base is not None else None
        saved = x.detach().clone() if saved is None else saved
        last, compared, flag = [version(x)], x.numel() <= MAX_COMPARED, x.requires_grad
        self._saved[id(x)] = saved, last

        def restore() -> bool:
            changed = version(x) != last[0] or (compared and not same(x, saved))
            if changed:
                with torch.no_grad():
                    if x.grad_fn is not None:  # something that requires a gradient was added to it
                        x.detach_()
                    x.requires_grad_(flag).copy_(saved)
                last[0] = version(x)
            return changed

        self._restores.append(restore)

    def unchanged(self, x: Tensor) -> Tensor | None:
        """What a tensor holds, if that was saved and it holds it still."""
        saved, last = self._saved.get(id(x), (None, [-1]))
        if saved is None or version(x) != last[0]:
            return None
        return saved if x.numel() > MAX_COMPARED or same(x, saved) else None

    def _module(self, module: nn.Module) -> Iterator[Any]:
        self._restores.append(partial(_restore_attributes, module, dict(vars(module))))
        for table in tables_of(module):
            if not self._sharded:  # FSDP exchanges parameters in the tables, as it gathers them
                self._restores.append(partial(_restore_dict, table, dict(table)))
        yield from own_attributes(module).values()
        for table in tables_of(module):
            yield from table.values()

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        if function.__module__ is not None and _foreign(function):
            return
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield vars(function)
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            put = partial(setattr, cell, "cell_contents")
            self._restores.append(partial(_reset, partial(_content, cell), put, held))
            self._hold(held, put)
            yield held
        names, rebound = _global_names(function.__code__)
        for name in names & function.__globals__.keys():
            held, put = function.__globals__[name], partial(function.__globals__.__setitem__, name)
            if name in rebound:
                self._restores.append(partial(_reset, partial(function.__globals__.get, name), put, held))
            self._hold(held, put)
            yield held

    def _container(self, x: Any) -> Iterable[Any]:
        if len(x) > MAX_ELEMENTS:
            if isinstance(x, list):
                self._restores.append(partial(_truncate, x, len(x)))
            return ()
        if isinstance(x, dict):
            self._restores.append(partial(_restore_dict, x, dict(x)))
            for key, value in x.items():
                self._hold(value, partial(x.__setitem__, key))
            return list(x.values())
        self._restores.append(partial(_restore_elements, x, list(x)))
        if isinstance(x, list):
            for index, value in enumerate(x):
                self._hold(value, partial(x.__setitem__, index))
        return () if isinstance(x, bytearray) else list(x)


def _forget(cached: Any, misses: int) -> bool:
    """Forget what a function has remembered since: it may be made of what stood in for parameters."""
    changed = bool(cached.cache_info().misses != misses)
    if changed:
        cached.cache_clear()
    return changed


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # emptied
        return cell


def _reset(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> bool:
    changed = get() is not value
    if changed:
        put(value)
    return changed


def same(x: Tensor, saved: Tensor) -> bool:
    """Whether two tensors hold the same values, nan among them."""
    return torch.equal(x, saved) or bool(((x == saved) | ((x != x) & (saved != saved))).all())


def _restore_attributes(module: nn.Module, saved: dict[str, Any]) -> bool:
    """All but the mode, which a measurement may set itself."""
    return _restore_dict(vars(module), {**saved, "training": module.training})


def _restore_dict(table: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    if len(table) == len(saved) and all(map(is_, table, saved)) and all(map(is_, table.values(), saved.values())):
        return False
    table.clear()
    table.update(saved)
    return True


def _restore_elements(x: Any, saved: list[Any]) -> bool:
    if len(x) == len(saved) and all(map(is_, x, saved)):
        return False
    x.clear()
    (x.update if isinstance(x, set) else x.extend)(saved)
    return True


def _truncate(x: list[Any], length: int) -> bool:
    longer = len(x) > length
    del x[length:]
    return longer


@lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names that a function, and those in it, read from its module, and those that it assigns there."""
    names, rebound = set(code.co_names), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            rebound.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, also = _global_names(inner)
            names, rebound = names | more, rebound | also
    return names, rebound


def _put_back(put: Callable[[Any], object], value: Any) -> bool:
    """Put back what may have changed, or not: that is not asked."""
    put(value)
    return True


def _put_generator(generator: torch.Generator, state: Tensor) -> bool:
    changed = not torch.equal(generator.get_state(), state)
    generator.set_state(state)
    return changed


def _put_array(array: Any, saved: Any) -> bool:
    changed = bool(array.tobytes() != saved.tobytes())
    if changed:
        array[...] = saved
    return changed


def _generator(x: Any) -> Callable[[], bool] | None:
    """How to put a source of random numbers, or an array of NumPy's, back; None for anything else."""
    if isinstance(x, torch.Generator):
        return partial(_put_generator, x, x.get_state())
    if isinstance(x, random.Random):
        return partial(_put_back, x.setstate, x.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(x, numpy.random.RandomState):
        return partial(_put_back, x.set_state, x.get_state())
    if isinstance(x, numpy.random.Generator):
        return partial(_put_back, partial(setattr, x.bit_generator, "state"), x.bit_generator.state)
    if isinstance(x, numpy.ndarray) and x.size <= MAX_COMPARED and x.flags.writeable:
        return partial(_put_array, x, x.copy())
    return None
