"""Where samples may be in the model's arguments: hypotheses, and the trials that one must pass.

A hypothesis says where samples are in the arguments and, for each differentiable output, where they may be there. It
holds where samples do not influence one another: while some of them are changed, the outputs of the others stay.
Integer arguments (offsets, lengths, edges, token ids) are structure and are never changed: where a model takes nothing
else, the rows that it looks up are.
"""

from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..._arguments import shown
from ..._torch.expected_draws import ExpectedDraws
from ..._torch.graph import tells_recomputation
from ..._torch.pytree import map_tensors, tensors_in
from ...errors import InvalidArgumentError
from ...layers.layout import Layout, layouts_of
from ...oneshot.independence import changed_entries, changed_samples, rounding_in
from ...owners import (
    Owned,
    Owner,
    changed_rows,
    owned_by_entries,
    owned_by_index,
    owned_by_lengths,
    owned_by_packing,
    with_entries_of,
)
from .integers import ChangedIntegers, mixed

#: What ``sample_dim`` may be: a dimension, one for each argument by name (None for one without samples), ``"list"``
#: where each entry of a list among the arguments is a sample, or None.
SampleDim = int | Literal["list"] | Mapping[str, int | None] | None

Forward = Callable[..., Any]


class Hypothesis(NamedTuple):
    """Where samples may be."""

    #: for each tensor among the arguments, the dimension that holds its samples; None for one without
    dims: tuple[int | None, ...]
    num_samples: int  #: how many there are
    alternative: int | None = None  #: another dimension of which the same holds
    owned: Owned | None = None  #: whose the tensors are whose samples no dimension holds; None where one does
    untested: bool = False  #: whether it is taken because nothing changed anything, as where weights start at zero
    #: whether data tells how many random numbers are drawn, so that one sample's shift those of the others
    shifting: bool = False

    @property
    def dim(self) -> int | None:
        """The dimension of the first argument that has samples."""
        return next((dim for dim in self.dims if dim is not None), None)

    @property
    def owners(self) -> tuple[Owner, ...]:
        """For each tensor among the arguments, whose its rows are: of what a dimension tells, the dimension."""
        return self.dims if self.owned is None else self.owned.owners


class Trial(NamedTuple):
    """The model on a batch whose samples are taken to be somewhere: what trials are made with."""

    forward: Forward  #: the model, on arguments
    arguments: Any  #: those of the batch
    hypothesis: Hypothesis  #: where samples are taken to be in them

    def changed(self, mask: Tensor, *, alike: bool = False) -> Any:
        """The output with other numbers for the samples of a mask: those of their neighbours, a little scaled.

        Entries of a list that hold no such numbers (texts, token ids of several lengths) are their neighbours' as they
        are. With an empty mask the graph is like that of changed ones; ``alike`` gives samples in a dimension those of
        the first.
        """
        _, arguments, hypothesis = self
        forward = self._steady
        integers = _only_integers(arguments, hypothesis)
        if integers and hypothesis.owned is not None and hypothesis.owned.grouping.place is None:
            count = hypothesis.num_samples
            chosen = [(n + int(mask[n])) % count for n in range(count)]
            return forward(with_entries_of(arguments, count, chosen))
        places = iter(zip(hypothesis.dims, hypothesis.owners, strict=True))

        def exchanged(tensor: Tensor) -> Tensor:
            dim, owner = next(places)
            if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_nested:
                return tensor
            if hypothesis.owned is not None and owner is not None and not _sparse(tensor):
                return changed_rows(tensor, owner, mask)
            if dim is None:
                return tensor
            if _sparse(tensor):
                return mixed(tensor.to_dense(), dim, mask, alike=alike).to_sparse(layout=tensor.layout)
            return mixed(tensor, dim, mask, alike=alike)

        if not integers:
            return forward(map_tensors(exchanged, arguments))
        nothing = not bool(mask.any())
        followed = torch.ones_like(mask) if nothing else mask
        rows = _rows_changed(arguments, hypothesis, followed)
        with ChangedIntegers(followed, rows, hypothesis.dim or 0, alike=alike, unchanged=nothing):
            return forward(map_tensors(exchanged, arguments))

    def unchanged(self) -> Any:
        """The output that those of changed samples are compared with."""
        return self._steady(self.arguments)

    def _steady(self, arguments: Any) -> Any:
        """The forward, with random numbers that changes of samples do not shift."""
        with ExpectedDraws() if self.hypothesis.shifting else nullcontext():
            return self.forward(arguments)

    def outputs_changed(self, mask: Tensor) -> list[Tensor] | None:
        """The tensors of that; None where the model does not accept such inputs, which tells nothing."""
        try:
            with torch.no_grad():
                return floating(self.changed(mask))
        except Exception:
            return None


class Separation(NamedTuple):
    """What samples that are changed tell of a hypothesis that they do not refute."""

    layouts: list[list[Layout]]  #: of each output, where the samples may be in it
    changed: bool  #: whether anything changed: where nothing did, this is no evidence
    accepted: bool = True  #: whether the model accepted what was changed
    #: whether an output of several numbers, in which no samples may be, goes by more than one of them
    beside: bool = False


def check_sample_dim(sample_dim: SampleDim) -> None:
    """Raise unless it is None, ``"list"``, a dimension, or a mapping to dimensions."""
    if isinstance(sample_dim, str) and sample_dim == "list":
        return
    dims = list(sample_dim.values()) if isinstance(sample_dim, Mapping) else [sample_dim]
    for dim in dims:
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 0):
            raise InvalidArgumentError(
                'sample_dim must be an integer of at least 0, "list", a mapping of argument names to such integers or '
                f"None, or None, got {shown(sample_dim)}."
            )


def from_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sample_dim: Mapping[str, int | None]
) -> Hypothesis:
    """The hypothesis that a mapping of names of the model's arguments states."""
    bound = signature(model.forward).bind_partial(*args, **kwargs).arguments
    unknown = [name for name in sample_dim if name not in bound and name not in kwargs]
    if unknown:
        raise InvalidArgumentError(f"sample_dim names {unknown}, but the model was called with {list(bound)}.")
    of_tensor: dict[int, int | None] = {}
    for name, dim in sample_dim.items():
        of_tensor.update((id(t), dim) for t in tensors_in(bound.get(name, kwargs.get(name))))
    dims = tuple(of_tensor.get(id(t)) for t in tensors_in((args, kwargs)))
    sizes = {t.shape[d] for t, d in zip(tensors_in((args, kwargs)), dims, strict=True) if d is not None and t.dim() > d}
    if not any(dim is not None for dim in sample_dim.values()):  # each call is one sample
        return Hypothesis(dims, 1)
    if len(sizes - {1}) > 1 or not sizes:
        raise InvalidArgumentError(f"in the dimensions of sample_dim the arguments have sizes {sorted(sizes)}.")
    return Hypothesis(dims, max(sizes))


def hypotheses(arguments: Any, outputs: Sequence[Tensor], dim: int | Literal["list"] | None) -> list[Hypothesis]:
    """What may be the samples, the usual first: a size in dim 0 of the arguments that the outputs have too, or dim 1.

    Behind these come the entries of a list, the graphs of a vector of indices, and the rows of which a list tells how
    many each sample has; packed sequences stand alone. A ``dim`` is as it was specified.
    """
    if dim is None and (packed := owned_by_packing(arguments)):
        return [of_owned(x, arguments) for x in packed]
    owned = owned_by_entries(arguments) if dim in (None, "list") else []
    if dim is None:
        told = [*owned_by_index(arguments), *owned_by_lengths(arguments)]
        owned += [x for x in told if any(_may_hold(f, x.num_samples) for f in outputs)]
    found = [] if dim == "list" else _in_dimensions(arguments, outputs, dim)[:4]
    if dim is None:
        found = [h for h in found if not any(_of_some_entries(h, x, arguments) for x in owned)]
    return found + [of_owned(x, arguments) for x in owned]


def _of_some_entries(hypothesis: Hypothesis, owned: Owned, arguments: Any) -> bool:
    """Whether samples in a dimension would be those of some entries of a list, and not of others of the same kind.

    Such as of token ids of several lengths, of which one is as long as an output is wide.
    """
    triples = zip(tensors_in(arguments), hypothesis.dims, owned.owners, strict=True)
    held = [(dim, t) for t, dim, owner in triples if isinstance(owner, int)]
    alike = len({(t.dim(), t.dtype) for _, t in held}) == 1
    return alike and 0 < sum(dim is None for dim, _ in held) < len(held)


def of_owned(owned: Owned, arguments: Any) -> Hypothesis:
    """The hypothesis that samples own tensors, or their rows; others hold them in a dimension, if any."""
    count, packed = owned.num_samples, owned.grouping.packed  # with a state, whose samples are in dim 1
    dims = [
        None if owner is not None or t.dim() == 0 or (t.shape[0] != count and not packed) else _dim_of(t, count, 0)
        for t, owner in zip(tensors_in(arguments), owned.owners, strict=True)
    ]
    return Hypothesis(tuple(dims), count, owned=owned)


def _in_dimensions(arguments: Any, outputs: Sequence[Tensor], dim: int | None) -> list[Hypothesis]:
    tensors = list(tensors_in(arguments))
    found = []
    for d in (0, 1) if dim is None else (dim,):
        sizes = list(dict.fromkeys(t.shape[d] for t in tensors if t.dim() > d))
        known = [size for size in sizes if size != 1 and any(_may_hold(f, size) for f in outputs)]
        rest = [size for size in sizes if size not in known]
        for size in known if known or (d and dim is None) else [s for s in rest if s != 1] or rest:
            found.append(Hypothesis(tuple(_dim_of(t, size, d) for t in tensors), size))
    return found


def _may_hold(output: Tensor, size: int) -> bool:
    return size in output.shape or bool(output.dim() and size and output.shape[0] and output.shape[0] % size == 0)


def _dim_of(tensor: Tensor, size: int, dim: int) -> int | None:
    """Where a tensor holds so many samples: in the dimension of all, or the only one of that size."""
    if tensor.dim() > dim and tensor.shape[dim] == size:
        return dim
    places = [d for d, s in enumerate(tensor.shape) if s == size]
    return places[0] if places else None


def any_layout(tensor: Tensor, count: int) -> list[Layout]:
    """Every layout that the shape of what a module returns admits for so many samples, the usual first."""
    return layouts_of(tensor.shape, count, any_dim=False)


def separates(trial: Trial, base: Sequence[Tensor], masks: Sequence[Tensor]) -> Separation | None:
    """The layouts of each output under which samples do not influence one another; None where some do.

    Each mask, bool, shape (N,), tells the samples that a trial changes.
    """
    count = trial.hypothesis.num_samples
    layouts = [any_layout(f, count) for f in base]
    if not any(layouts):
        return None
    options, changes, base = list(layouts), False, [f.detach() for f in base]
    bounds = [rounding_in(f) for f in base]
    owners = [torch.ones(count, dtype=torch.bool) for _ in base]  # that may own all of an output
    waiting, masks, refuted = deque(masks), [], False
    while waiting:
        masks.append(mask := waiting.popleft())
        changed = trial.outputs_changed(mask)
        if changed is None:
            return Separation(layouts, changed=False, accepted=False)
        if len(changed) != len(base):
            return None
        for index, (before, after) in enumerate(zip(base, changed, strict=True)):
            if not layouts[index]:
                if _moved(before, after):
                    owners[index] = owners[index] & mask
                continue
            if before.shape != after.shape:
                return None
            moved = changed_samples(before, after, layouts[index], bounds[index])
            kept = ~mask.to(before.device)
            if moved[0].any():
                changes = True
                owners[index] = owners[index] & mask
            still = [o for o, m in zip(layouts[index], moved, strict=True) if not bool(m[kept].any())]
            options[index] = [o for o in options[index] if o in still]
            if options[index]:
                continue
            if not (owners[index].any() and tells_recomputation()):  # or rows are not followed
                return None
            if not refuted:  # unless one sample owns it: what all move, the others move, too
                refuted = True
                waiting.appendleft(~mask)
    of_one = [
        bool(o) or not every or _is_one(own, masks) for o, every, own in zip(options, layouts, owners, strict=True)
    ]
    if not any(options) or not all(of_one):
        return None
    without = [own for own, every in zip(owners, layouts, strict=True) if not every and not own.all()]
    return Separation(options, changed=changes, beside=not all(_is_one(own, masks) for own in without))


def one_each(trial: Trial, base: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
    """Whether each output of several numbers is one sample's, such as an entry of a list; masks as above."""
    owners = [torch.ones(trial.hypothesis.num_samples, dtype=torch.bool) for _ in base]
    for mask in masks:
        changed = trial.outputs_changed(mask)
        if changed is None or len(changed) != len(base):
            return False
        for own, before, after in zip(owners, base, changed, strict=True):
            if _moved(before, after):
                own &= mask
    return all(_is_one(own, masks) for own, f in zip(owners, base, strict=True) if f.numel() > 1)


def _moved(before: Tensor, after: Tensor) -> bool:
    """Whether an output of several numbers has changed."""
    return before.numel() > 1 and (before.shape != after.shape or bool(changed_entries(before.detach(), after).any()))


def _is_one(owners: Tensor, masks: Sequence[Tensor]) -> bool:
    """Whether one sample alone moves an output: an entry of a list, say, of rows that are as many as the samples."""
    return int(owners.sum()) == 1 and all(
        bool(owners[n]) or any(bool(mask[n]) and not bool((mask & owners).any()) for mask in masks)
        for n in range(len(owners))
    )


def equivariant(trial: Trial) -> bool:
    """Whether the model treats what may be its samples alike: exchanged there, they are so in its outputs."""
    forward, arguments, hypothesis = trial
    if hypothesis.owned is not None:
        return True
    order = torch.arange(hypothesis.num_samples, device="cpu").roll(1)
    dims = iter(hypothesis.dims)

    def exchanged(tensor: Tensor) -> Tensor:
        dim = next(dims)
        return tensor if dim is None or _sparse(tensor) else tensor.index_select(dim, order.to(tensor.device))

    try:
        with torch.no_grad():
            base, after = floating(forward(arguments)), floating(forward(map_tensors(exchanged, arguments)))
    except Exception:  # an order that the model does not accept
        return False
    for before, now in zip(base, after, strict=True):
        options = any_layout(before, hypothesis.num_samples)
        if options and not any(
            not bool(changed_entries(o.split(before)[order.to(before.device)], o.split(now)).any()) for o in options
        ):
            return False
    return True


def floating(tree: Any) -> list[Tensor]:
    """The tensors of real or complex numbers in a structure."""
    return [t for t in tensors_in(tree) if (t.is_floating_point() or t.is_complex()) and not _sparse(t)]


def _rows_changed(arguments: Any, hypothesis: Hypothesis, mask: Tensor) -> Mapping[Tensor, tuple[Tensor, int]]:
    """Of the tensors that hold samples, which rows are those of changed ones, and in which dimension."""
    found: MutableMapping[Tensor, tuple[Tensor, int]] = WeakTensorKeyDictionary()
    for tensor, dim, owner in zip(tensors_in(arguments), hypothesis.dims, hypothesis.owners, strict=True):
        if isinstance(owner, Tensor):  # entries of a list are changed whole, elsewhere
            found[tensor] = mask[owner.cpu().long()], 0
        elif dim is not None:
            found[tensor] = mask, dim
    return found


def _sparse(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.is_nested


def _only_integers(arguments: Any, hypothesis: Hypothesis) -> bool:
    return not any(
        (dim is not None or owner is not None) and (t.is_floating_point() or t.is_complex())
        for t, dim, owner in zip(tensors_in(arguments), hypothesis.dims, hypothesis.owners, strict=True)
    )


def shapes_of(arguments: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors among the arguments, ``(args, kwargs)`` or any other structure.

    Of a nested tensor, how many it holds: the rest differs.
    """
    return tuple([(t.size(0),) if t.is_nested else tuple(t.shape) for t in tensors_in(arguments)])
