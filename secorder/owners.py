"""Samples that no dimension holds: entries of a list, graphs that a vector gives nodes to, and packed sequences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._torch.pytree import map_tensors, tensors_in

#: Whose a tensor is: one sample's, by row of its first dimension that of a vector, or nobody's.
Owner = int | Tensor | None

Found = TypeVar("Found")


class Grouping(NamedTuple):
    """How samples own what is among the arguments."""

    #: of the tensor whose numbers tell the rows' samples; None where samples are the entries of lists
    place: int | None
    tensors: int  #: among the arguments; zero for lists, which may have any length
    packed: bool = False  #: whether they are the sequences of a ``PackedSequence``
    lengths: bool = False  #: whether it is no tensor but a list of how many rows each sample has

    def of(self, arguments: Any) -> "Owned | None":
        """Whose the tensors of a batch are; None where it has nothing of the kind, or more than one."""
        tell: Callable[[Any], list[Owned]] = owned_by_entries if self.place is None else owned_by_index
        if self.packed or self.lengths:
            tell = owned_by_packing if self.packed else owned_by_lengths
        alike = [owned for owned in tell(arguments) if self.place is None or owned.grouping == self]
        return alike[0] if len(alike) == 1 else None


class Owned(NamedTuple):
    """Which sample each tensor among some arguments, or each of its rows, belongs to."""

    owners: tuple[Owner, ...]  #: by tensor
    num_samples: int  #: how many there are
    grouping: Grouping  #: how that is told


def owned_by_entries(arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> list[Owned]:
    """Lists of one entry a sample, such as images of several sizes; those of one length hold the same samples.

    Where there are no tensors at all, any list may be one: of texts, of trees.
    """
    by_length: dict[int, dict[int, int]] = {}
    args, kwargs = arguments
    if all(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
        return []
    tensors = list(tensors_in(arguments))
    for tree in (*args, *kwargs.values()):
        for entries in _outermost(tree, partial(_entries_of, of_tensors=bool(tensors))):
            owners = by_length.setdefault(len(entries), {})
            owners.update((id(t), n) for n, entry in enumerate(entries) for t in tensors_in(entry))
    grouping = Grouping(None, 0)
    return [Owned(tuple(owners.get(id(t)) for t in tensors), size, grouping) for size, owners in by_length.items()]


def _entries_of(tree: Any, *, of_tensors: bool) -> list[Any] | None:
    """The entries of a list, each of which holds tensors, or whatever they hold."""
    if type(tree) not in (list, tuple) or not tree:
        return None
    return list(tree) if not of_tensors or all(next(tensors_in(x), None) is not None for x in tree) else None


def owned_by_index(arguments: Any) -> list[Owned]:
    """Rows whose samples a vector tells, such as the nodes of a batch of graphs.

    By their samples, ``[0, 0, 1, 1, 1, 2, …]``, or by where each begins and ends, ``[0, 2, 5, …]``.
    """
    tensors = list(tensors_in(arguments))
    found = []
    for place, vector in enumerate(tensors):
        index = _index(vector, [t.shape[0] for t in tensors if t is not vector and t.dim()])
        if index is not None:
            owners = tuple(index if t.dim() and t.shape[0] == len(index) else None for t in tensors)
            found.append(Owned(owners, int(index.max()) + 1, Grouping(place, len(tensors))))
    return found


def _index(tensor: Tensor, rows: Sequence[int]) -> Tensor | None:
    """The sample of each row, where numbers tell it of one of so many rows."""
    if tensor.dim() != 1 or tensor.dtype not in (torch.int64, torch.int32) or len(tensor) < 2 or tensor.is_meta:
        return None
    least, most = int(tensor.min()), int(tensor.max())
    if least == 0 and len(tensor) in rows and len(tensor.unique()) == most + 1:
        return tensor
    if int(tensor[0]) == 0 and most in rows and bool((tensor.diff() > 0).all()):
        return torch.arange(len(tensor) - 1, device=tensor.device).repeat_interleave(tensor.diff())
    return None


def owned_by_lengths(arguments: Any) -> list[Owned]:
    """Rows of which each sample has so many, one after the other, as a list of integers tells: ``x.split(lengths)``."""
    tensors = list(tensors_in(arguments))
    found = []
    for place, lengths in enumerate(_outermost(arguments, _lengths)):
        rows = sum(lengths)
        if any(t.dim() and t.shape[0] == rows for t in tensors):
            index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            owners = tuple(index.to(t.device) if t.dim() and t.shape[0] == rows else None for t in tensors)
            found.append(Owned(owners, len(lengths), Grouping(place, len(tensors), lengths=True)))
    return found


def _lengths(tree: Any) -> list[int] | None:
    """The numbers of a list, a tuple or a NumPy vector of integers, of which none is below zero."""
    kind = getattr(getattr(tree, "dtype", None), "kind", "")
    if type(kind) is str and kind and kind in "iu" and getattr(tree, "ndim", 0) == 1:
        tree = tree.tolist()
    is_list = type(tree) in (list, tuple) and bool(tree) and all(type(x) is int and x >= 0 for x in tree)
    return list(tree) if is_list else None


def owned_by_packing(arguments: Any) -> list[Owned]:
    """The sequences of a ``PackedSequence``: its rows are those of the longest ones at first, step after step."""
    tensors = list(tensors_in(arguments))
    found = []
    for packed in _outermost(arguments, lambda x: x if isinstance(x, PackedSequence) else None):
        sizes = packed.batch_sizes.tolist()
        order = torch.arange(sizes[0]) if packed.sorted_indices is None else packed.sorted_indices.cpu()
        index = torch.cat([order[:size] for size in sizes])
        place = next(place for place, t in enumerate(tensors) if t is packed.batch_sizes)
        owners = tuple(index if t is packed.data else None for t in tensors)
        found.append(Owned(owners, sizes[0], Grouping(place, len(tensors), packed=True)))
    return found


def _outermost(tree: Any, seen: Callable[[Any], Found | None]) -> Iterator[Found]:
    """What is seen in a structure of plain lists, tuples and dicts, and not in what it lies in."""
    here = seen(tree)
    if here is not None:
        yield here
        return
    for child in tree if type(tree) in (list, tuple) else tree.values() if type(tree) is dict else ():
        yield from _outermost(child, seen)


def replace_outermost(tree: Any, replaced: Callable[[Any], Any], leaf: Callable[[Any], Any]) -> Any:
    """A structure of plain lists, tuples and dicts with other parts where there are any, and with other leaves."""
    here = replaced(tree)
    if here is not None:
        return here
    if type(tree) in (list, tuple):
        return type(tree)(replace_outermost(child, replaced, leaf) for child in tree)
    if type(tree) is dict:
        return {key: replace_outermost(child, replaced, leaf) for key, child in tree.items()}
    return leaf(tree)


def changed_rows(tensor: Tensor, owner: int | Tensor, mask: Tensor) -> Tensor:
    """The tensor with other numbers for some samples, those of ``mask``, shape ``(N,)``."""
    if isinstance(owner, int):
        return tensor.flatten().roll(1).view_as(tensor) * 1.03125 if bool(mask[owner]) else tensor
    here = mask.to(tensor.device)[owner.long()].view(-1, *(1,) * (tensor.dim() - 1))
    return torch.where(here, tensor.roll(1, 0) * 1.03125, tensor)


def take_owned(tree: Any, owned: Owned, tensors: Sequence[Tensor], chosen: Sequence[int]) -> Any:
    """What belongs to some samples, in this order, in a structure of arguments; ``tensors`` are all arguments'."""
    if owned.grouping.place is None:
        return replace_outermost(tree, partial(_chosen, owned.num_samples, chosen, True), lambda leaf: leaf)
    if owned.grouping.lengths:
        return _of_lengths(tree, owned, chosen)
    nodes = _Nodes(tensors[owned.grouping.place], tensors, owned.owners, chosen)
    return map_tensors(nodes.take, tree)


def _of_lengths(tree: Any, owned: Owned, chosen: Sequence[int]) -> Any:
    """The rows of some samples, and how many each has."""
    index = next(owner for owner in owned.owners if isinstance(owner, Tensor)).cpu()
    rows = torch.cat([(index == n).nonzero().flatten() for n in chosen])
    taken = {len(index): rows, owned.num_samples: torch.tensor(list(chosen))}

    def lengths(tree: Any) -> Any:
        found = _lengths(tree)
        if found is None or (len(found), sum(found)) != (owned.num_samples, len(index)):
            return None
        return type(tree)(tree[n] for n in chosen) if type(tree) in (list, tuple) else tree[list(chosen)]

    def take(tensor: Tensor) -> Tensor:
        kept = taken.get(tensor.shape[0]) if tensor.dim() else None
        return tensor if kept is None else tensor[kept.to(tensor.device)]

    return replace_outermost(tree, lengths, partial(map_tensors, take))


def with_entries_of(
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]], count: int, chosen: Sequence[int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with other entries of the lists that hold one a sample, and the same rows of tensors of one a sample.

    ``chosen`` tells by sample whose entry is to be in its place.
    """

    def row(tensor: Tensor) -> Tensor:
        return tensor[list(chosen)] if tensor.dim() and tensor.shape[0] == count else tensor

    args, kwargs = arguments
    entries = partial(_chosen, count, chosen, next(tensors_in(arguments), None) is not None)
    take = partial(replace_outermost, replaced=entries, leaf=partial(map_tensors, row))
    return tuple(map(take, args)), {key: take(x) for key, x in kwargs.items()}


def _chosen(count: int, chosen: Sequence[int], of_tensors: bool, tree: Any) -> Any:
    """Some entries of a list of one a sample; None for anything else."""
    entries = _entries_of(tree, of_tensors=of_tensors)
    return None if entries is None or len(entries) != count else type(tree)(entries[n] for n in chosen)


class _Nodes:
    """The nodes of some graphs, and the edges between them."""

    def __init__(
        self, vector: Tensor, tensors: Sequence[Tensor], owners: Sequence[Owner], chosen: Sequence[int]
    ) -> None:
        self.vector = vector
        index = self.index = next(owner for owner in owners if isinstance(owner, Tensor))
        self.owned = {id(t) for t, owner in zip(tensors, owners, strict=True) if owner is not None}
        self.rows = [(index == n).nonzero().flatten() for n in chosen]
        edges = next((t for t in tensors if self._are_edges(t)), None)
        self.kept = None if edges is None else [(index[edges] == n).all(0).nonzero().flatten() for n in chosen]
        self.number = None if edges is None else edges.shape[1]

    def _are_edges(self, tensor: Tensor) -> bool:
        pairs = tensor.dim() == 2 and tensor.shape[0] == 2 and tensor.shape[1] > 0
        return pairs and tensor.dtype == torch.int64 and bool(((tensor >= 0) & (tensor < len(self.index))).all())

    def take(self, tensor: Tensor) -> Tensor:
        """What of a tensor belongs to them."""
        sizes = torch.tensor([len(rows) for rows in self.rows], device=tensor.device)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        if tensor is self.vector and id(tensor) not in self.owned:
            return starts.to(tensor.dtype)
        if tensor is self.vector:
            return torch.arange(len(sizes), device=tensor.device).repeat_interleave(sizes).to(tensor.dtype)
        if id(tensor) in self.owned:
            return tensor[torch.cat(self.rows)]
        if self.kept is not None and self._are_edges(tensor):
            moved = []
            for kept, rows, start in zip(self.kept, self.rows, starts, strict=False):
                places = torch.zeros_like(self.index, dtype=torch.int64)
                places[rows] = torch.arange(len(rows), device=tensor.device) + start
                moved.append(places[tensor[:, kept]])
            return torch.cat(moved, 1)
        if self.kept is not None and tensor.dim() and tensor.shape[0] == self.number:
            return tensor[torch.cat(self.kept)]
        return tensor
