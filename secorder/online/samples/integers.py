"""Samples that are given by integers alone: what is made of some samples' integers is changed, in place of them.

Integers are structure (token ids, offsets, edges) and are never changed themselves. Which elements of a tensor are
those of changed samples is followed through all that is done with integers (a transpose, a shift, padding), by doing
the same with ones in their places, and with zeros; where that makes real numbers of them, as a table does, these are
changed.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..._torch.fsdp import local
from ..._torch.pytree import map_tensors, tensors_in
from ...parallel.spread import is_distributed

_TABLES = (F.embedding, F.embedding_bag)


class ChangedIntegers(TorchFunctionMode):
    """Inside, the integers of a mask's samples make other numbers than they do.

    Args:
        rows: of the tensors that hold samples, which rows are those of changed ones, and in which dimension.
        dim: that of the first argument that has samples.
        alike: give them the numbers of the first row, as they are.
        unchanged: leave all numbers what they are, in a graph like that of numbers that are changed.
    """

    def __init__(
        self, mask: Tensor, rows: Mapping[Tensor, tuple[Tensor, int]], dim: int, *, alike: bool, unchanged: bool = False
    ) -> None:
        super().__init__()
        self._mask, self._dim, self._alike, self._unchanged = mask, dim, alike, unchanged
        #: By tensor, which of its elements are those of changed samples.
        self._changed: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        #: By tensor, which of its rows are, where it lies over ranks.
        self._spread: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        for tensor, (own, at) in rows.items():
            self._spread[tensor] = own
            if not tensor.is_nested:
                self._changed[tensor] = _along(own, tensor, at)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        followed = any(t in self._changed for t in given)
        target = args[0] if followed and _writes(func) and isinstance(args[0], Tensor) else None
        before = None if target is None else self._changed.get(target)
        result = func(*args, **kwargs)
        if any(is_distributed(t) for t in given):
            return self._of_ranks(func, given, result)
        if not followed:
            return result
        if target is not None:
            if not target.is_floating_point():
                self._write(func, target, before, args, kwargs)
            return result
        if any(t.is_floating_point() for t in given) and not _looks_up(func, args, kwargs):
            return result
        made = self._made(func, args, kwargs, result)
        return map_tensors(lambda t: self._take(t, next(made)), result)

    def _take(self, made: Tensor, changed: Tensor | None) -> Tensor:
        """A tensor that was made of integers: followed where it holds some, and changed where it holds real numbers."""
        if changed is None or not changed.any():
            return made
        if made.is_floating_point():
            return _exchanged(made, changed, self._mask, alike=self._alike, unchanged=self._unchanged)
        self._changed[made] = changed
        return made

    def _made(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Of each tensor in a result, which elements are made of those of changed samples; None where it has none."""
        results = list(tensors_in(result))
        if not results:
            return iter(())
        if func is F.embedding or func is Tensor.__getitem__:  # without a look-up of its own
            ids = args[func is not F.embedding] if args else kwargs["input"]
            if isinstance(ids, Tensor) and ids in self._changed:
                own = self._changed[ids]
                return iter([own.view(*own.shape, *(1,) * (result.dim() - own.dim())).expand_as(result)])
        if func is F.embedding_bag and (args[0] if args else kwargs["input"]).dim() == 1:  # whose bags offsets tell
            return iter([self._by_size(result)])
        try:
            ones, zeros = [list(tensors_in(func(*self._with(args, x), **self._with(kwargs, x)))) for x in (1, 0)]
            if [t.shape for t in ones] == [t.shape for t in zeros] == [t.shape for t in results]:
                return iter(
                    [(one != zero).to(made.device) for one, zero, made in zip(ones, zeros, results, strict=True)]
                )
        except Exception:  # of integers that mean something else, such as a number of classes
            pass
        return iter([self._by_size(t) for t in results])

    def _by_size(self, made: Tensor) -> Tensor | None:
        """Where it cannot be followed: the rows where samples were, if there are as many."""
        # Elsewhere a dimension of that size may be that of positions, whose rows all samples share.
        enough = made.dim() > self._dim + int(made.is_floating_point())
        same = enough and made.shape[self._dim] == len(self._mask)
        return _along(self._mask, made, self._dim) if same else None

    def _with(self, arguments: Any, value: int) -> Any:
        """Arguments with a number in the place of changed samples' integers, and zero in that of others'."""
        return map_tensors(lambda t: (self._changed[t] * value).to(t.dtype) if t in self._changed else t, arguments)

    def _write(self, func: Any, target: Tensor, before: Tensor | None, args: Any, kwargs: Any) -> None:
        """Follow what is written into a tensor."""
        try:
            written = []
            for value in (1, 0):
                own = torch.zeros_like(target) if before is None else (before * value).to(target.dtype)
                func(own, *self._with(args[1:], value), **self._with(kwargs, value))
                written.append(own)
            self._changed[target] = written[0] != written[1]
        except Exception:  # of integers that mean something else
            return

    def _of_ranks(self, func: Any, given: list[Tensor], result: Any) -> Any:
        """The same of tensors that lie over ranks, by rows: a table looks them up without a graph."""
        all_rows = {id(rows): rows for t in given if (rows := self._rows(t)) is not None}
        if not isinstance(result, Tensor) or len(all_rows) != 1:
            return result
        (rows,) = all_rows.values()
        if not result.is_floating_point():
            self._spread[result] = rows
            return result
        table = func in _TABLES or not any(t.is_floating_point() for t in given)
        if table and result.dim() > self._dim + 1 and result.shape[self._dim] == len(rows):
            part = local(result)
            part.copy_(mixed(part, self._dim, rows, alike=self._alike))
        return result

    def _rows(self, tensor: Tensor) -> Tensor | None:
        """Which rows of a tensor change, if it is one of the integers, or what each rank has of them."""
        if not is_distributed(tensor) or tensor.is_floating_point():
            return self._spread.get(tensor)
        memory = local(tensor).untyped_storage().data_ptr()
        for own, changed in self._changed.items():  # copies of the arguments among them, on which models are run
            if memory == own.untyped_storage().data_ptr() and changed.dim() > self._dim:
                return changed.movedim(self._dim, 0).flatten(1).any(1) if changed.dim() > 1 else changed
        return next((rows for own, rows in self._spread.items() if memory == own.untyped_storage().data_ptr()), None)


def mixed(tensor: Tensor, dim: int, mask: Tensor, *, alike: bool) -> Tensor:
    """A tensor with other numbers in some rows: those of their neighbours, a little scaled, or of the first one."""
    return torch.where(_along(mask, tensor, dim), _others(tensor, dim, alike=alike), tensor)


def _others(tensor: Tensor, dim: int, *, alike: bool) -> Tensor:
    tensor = tensor.detach()  # a sample's rows get no gradient from where they stand for another's
    if not bool(tensor.any()):  # a state that starts at zero
        return torch.linspace(0.5, 1.5, tensor.numel(), device=tensor.device).to(tensor.dtype).view_as(tensor)
    return tensor.narrow(dim, 0, 1) if alike else tensor.roll(1, dim) * 1.03125


def _exchanged(made: Tensor, changed: Tensor, mask: Tensor, *, alike: bool, unchanged: bool) -> Tensor:
    """Real numbers with others in some places: those of the rows beside, where the places are whole rows.

    Which dimension these are rows of is told by where the places differ; where those of all samples are changed, as
    elsewhere by the number of samples, so that a sample gets the same numbers whichever others are changed with it.
    """
    dims = [d for d in range(made.dim()) if made.shape[d] == len(mask)] or list(range(made.dim()))
    differing = [] if mask.all() else [d for d in dims if not bool((changed == changed.narrow(d, 0, 1)).all())]
    dim = next(iter(differing or dims), 0)
    here = torch.zeros_like(changed) if unchanged else changed
    return torch.where(here, _others(made, dim, alike=alike), made) if made.dim() else made


def _along(rows: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """For each element of a tensor, whether its row is one of some."""
    shaped = rows.to(tensor.device).view(*(-1 if d == dim else 1 for d in range(tensor.dim())))
    return shaped.expand(tensor.shape)


def _looks_up(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function makes real numbers of integers by a table: a parameter that they are the rows of."""
    if func in _TABLES:
        return True
    table = args[0] if args else kwargs.get("input")
    known = func in (Tensor.__getitem__, Tensor.index_select, torch.index_select)
    return known and isinstance(table, Tensor) and table.is_leaf and table.requires_grad


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
