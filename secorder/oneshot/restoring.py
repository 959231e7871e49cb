"""How one object is restored: each function notes what the object holds now, and returns what puts that back."""

import io
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.versions import version
from .user_code import is_foreign

#: Puts an object back, and tells whether it had been changed.
Restore = Callable[[], bool]

#: Elements of a tensor or an array that are compared one by one: changes through ``.data`` are not counted.
MAX_COMPARED = 1_000_000


def _restored(changed: bool, put: Callable[[], object]) -> bool:
    if changed:
        put()
    return changed


def of_variable(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Restore:
    """Of what is assigned (an attribute, a global variable) and is this value now."""
    return lambda: _restored(get() is not value, partial(put, value))


def of_cell(cell: types.CellType, value: Any) -> Restore:
    """Of a variable that functions close over."""

    def get() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # emptied
            return cell

    return of_variable(get, partial(setattr, cell, "cell_contents"), value)


def of_dict(table: dict[Any, Any]) -> Restore:
    """Of a dictionary: its keys, their order, and the very objects that they stand for."""
    return partial(_restore_dict, table, dict(table))


def of_attributes(module: nn.Module) -> Restore:
    """Of a module: all but the mode, which a measurement may set itself, and a compiled module has not."""
    saved, mode = dict(vars(module)), "training" in vars(module)
    return lambda: _restore_dict(vars(module), {**saved, "training": module.training} if mode else saved)


def _restore_dict(table: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    if _alike(table, saved) and _alike(table.values(), saved.values()):
        return False
    table.clear()
    table.update(saved)
    return True


def of_elements(x: list[Any] | set[Any] | deque[Any] | bytearray) -> Restore:
    """Of a container: the very objects in it."""
    saved = list(x)

    def put() -> None:
        x.clear()
        (x.update if isinstance(x, set) else x.extend)(saved)

    return lambda: _restored(not _alike(x, saved), put)


def _alike(x: Collection[Any], saved: Collection[Any]) -> bool:
    return len(x) == len(saved) and all(map(is_, x, saved))


def of_length(x: list[Any]) -> Restore:
    """Of a long list: what was appended is taken off again."""
    length = len(x)
    return lambda: _restored(len(x) > length, partial(x.__delitem__, slice(length, None)))


def of_cache(function: Any) -> Restore:
    """Of a function that remembers: what it has remembered since is forgotten; it may be made of replacements."""
    misses = function.cache_info().misses
    return lambda: _restored(function.cache_info().misses != misses, function.cache_clear)


class SavedTensor:
    """A tensor and a copy of what it holds, perhaps one that is there already."""

    def __init__(self, tensor: Tensor, values: Tensor | None = None) -> None:
        self.values = tensor.detach().clone() if values is None else values
        self._tensor, self._requires_grad = tensor, tensor.requires_grad
        self._version = version(tensor)

    def changed(self) -> bool:
        """Whether the tensor holds something else by now."""
        x = self._tensor
        return version(x) != self._version or (x.numel() <= MAX_COMPARED and not same(x, self.values))

    def restore(self) -> bool:
        """Put it back; whether it had been changed."""
        x, changed = self._tensor, self.changed()
        if changed:
            with torch.no_grad():
                if x.grad_fn is not None:  # something that requires a gradient was added to it
                    x.detach_()
                x.requires_grad_(self._requires_grad).copy_(self.values)
            self._version = version(x)
        return changed


def same(x: Tensor, saved: Tensor) -> bool:
    """Whether two tensors hold the same values, nan among them."""
    return torch.equal(x, saved) or bool(((x == saved) | ((x != x) & (saved != saved))).all())


def of_numbers(x: Any) -> Restore | None:
    """Of a source of random numbers, or an array of NumPy's; None for anything else.

    Whether Python's and NumPy's sources were drawn from is not asked: they count as changed.
    """
    if isinstance(x, torch.Generator):
        state = x.get_state()
        return lambda: _restored(not torch.equal(x.get_state(), state), partial(x.set_state, state))
    if isinstance(x, random.Random):
        return partial(_restored, True, partial(x.setstate, x.getstate()))
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(x, numpy.random.RandomState):
        return partial(_restored, True, partial(x.set_state, x.get_state()))
    if isinstance(x, numpy.random.Generator):
        return partial(_restored, True, partial(setattr, x.bit_generator, "state", x.bit_generator.state))
    if isinstance(x, numpy.ndarray) and x.size <= MAX_COMPARED and x.flags.writeable:
        saved = x.copy()
        return lambda: _restored(x.tobytes() != saved.tobytes(), partial(x.__setitem__, ..., saved))
    return None


def used_up(x: Any) -> bool:
    """Whether taking from an object cannot be put back: a generator, the iterator of a data loader; not one's own."""
    own = hasattr(x, "__dict__") and not is_foreign(type(x))
    return isinstance(x, Iterator) and not own and not isinstance(x, io.IOBase)
