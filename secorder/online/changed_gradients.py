"""Backward hooks of the user's, on modules and on tensors: do they change gradients by more than constant factors?

They are for the user's backward, so that passes of our own call none of them: what they do is seen where they do it.
Those on the model itself, on its outputs, and on what the loss computes from these, change what comes to the outputs.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from .._torch.compile import never_compiled
from .._torch.graph import dtypes_of, fewest_digits, nodes_behind
from .._torch.modules import backward_hook_dicts
from .._torch.surroundings import inside_transform
from ..layers.dtypes import rounding
from ..layers.layout import Layout
from .finite import largest

if TYPE_CHECKING:
    from .fisher import OnlineFisher
    from .losses.seen import SeenLoss

#: By hook, or output of the model, and gradient, what the entries of each sample were multiplied by.
Factors = dict[tuple[int, int, int], Tensor]

#: In the place of a module and its hook, of what comes to the model's outputs.
_OUTPUTS = (0, 0)

CHANGED = (
    "{} changes gradients by more than constant factors (it clamps or normalises "
    "them), so that those of a batch do not tell what a sample's own would be: remove it while the probe is attached, "
    "or measure with one-shot calls."
)


class WatchedHooks:  # a handle
    """Hooks that are watched in this forward's backward; until :meth:`remove`, a hook of ours is in their places."""

    def __init__(self, fisher: "OnlineFisher", factors: Factors, modules: Iterable[nn.Module]) -> None:
        self._places: list[tuple[dict[int, Any], int, Any, partial[Any]]] = []
        for module in modules:
            for table in backward_hook_dicts(module):
                for key, hook in table.items():
                    watched = partial(_called, hook, ref(fisher), factors, (id(module), key))
                    self._places.append((table, key, hook, watched))
        here = {_OUTPUTS, *(watched.args[-1] for *_, watched in self._places)}
        for place in list(factors):  # another thread's backward may enter some
            if place[:2] not in here:  # of a hook that is gone
                factors.pop(place, None)
        for table, key, _, watched in self._places:
            table[key] = watched

    def remove(self) -> None:
        """The user's hooks are in their places again."""
        for table, key, hook, watched in self._places:
            if table.get(key) is watched:
                table[key] = hook
        self._places.clear()


def _called(hook: Any, of: Any, factors: Factors, place: tuple[int, int], module: nn.Module, *gradients: Any) -> Any:
    """What the user's hook makes of gradients on the module's inputs, or of those on its outputs before they come."""
    found, fisher = hook(module, *gradients), of()
    if found is not None and fisher is not None:
        where = f"a backward hook on a module of type {type(module).__name__}"
        before, after = (x if isinstance(x, tuple) else (x,) for x in (gradients[0], found))
        for index, (g, u) in enumerate(zip(before, after, strict=False)):
            if isinstance(g, Tensor) and isinstance(u, Tensor) and g is not u and g.shape == u.shape:
                key = (*place, index)
                fisher.troubles.guarded(None, fisher.by_layer, _compare, fisher, factors, key, where, g, u, g.dtype)
    return found


def watch_gradients(fisher: "OnlineFisher", factors: Factors, loss: "SeenLoss") -> None:
    """See in this backward whether hooks between a loss and the model's outputs change gradients.

    Raises :class:`UnknownNode`.
    """
    gradients = loss.gradients
    ends = {node for node, _ in loss.outputs}
    inside = list(nodes_behind(ends)) if len(ends) > 1 else []  # what computes an output from another one
    if not set(inside).isdisjoint(loss.order):
        return
    least = fewest_digits(dtypes_of([*loss.order, *inside]))
    for index, (place, g) in enumerate(gradients.items()):
        brought = [g.detach()]
        for node in inside:
            for number, source in enumerate(node.next_functions):
                if source == place:
                    node.register_hook(partial(_gave_besides, brought, number))
        key, layout = (*_OUTPUTS, index), loss.outputs[place].layout
        came = _Came(ref(fisher), factors, key, place[1], brought, layout, least)
        place[0].register_prehook(came)


@never_compiled
def gave(brought: list[Tensor], index: int, gradients: Sequence[Tensor | None], _: Any) -> None:
    """A hook on an operation: it has brought a gradient to one of the tensors that it was given."""
    g = gradients[index] if index < len(gradients) else None
    if g is not None and not inside_transform():
        brought.append(g.detach())


@never_compiled
def _gave_besides(brought: list[Tensor], index: int, gradients: Sequence[Tensor | None], node: Any) -> None:
    """:func:`gave` besides what the loss has brought, until that has come."""
    if brought:
        gave(brought, index, gradients, node)


class _Came(NamedTuple):
    """A hook on what computed an output of the model: the gradient on it has come, behind all hooks of others."""

    of: "ref[OnlineFisher]"
    factors: Factors
    key: tuple[int, int, int]
    number: int
    brought: list[Tensor]  #: what operations bring to it
    layout: Layout
    least: torch.dtype  #: the least precise one that these were computed in

    @never_compiled
    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        fisher, u = self.of(), gradients[self.number]
        if fisher is not None and u is not None and self.brought and not inside_transform():
            fisher.troubles.guarded(None, fisher.by_layer, self._compare, fisher, [*self.brought], u)
        self.brought.clear()  # in one backward pass alone

    def _compare(self, fisher: "OnlineFisher", brought: list[Tensor], u: Tensor) -> None:
        where = "a backward hook on the model, its outputs, or what the loss computes from them,"
        g, u = (self.layout.split(x) for x in (sum(brought[1:], brought[0]), u))
        _compare(fisher, self.factors, self.key, where, g, u, self.least)


@torch.no_grad()
def _compare(
    fisher: "OnlineFisher",
    factors: Factors,
    key: tuple[int, int, int],
    where: str,
    g: Tensor,
    u: Tensor,
    least: torch.dtype,
) -> None:
    """Mark all layers where gradients ``u`` are not what others are, but for what all samples are multiplied by."""
    known = factors.pop(key, None)
    if g.is_complex() and u.is_complex():
        g, u = (torch.view_as_real(x.resolve_conj()) for x in (g, u))
    size = largest(u) if u.numel() else u.new_full((), torch.inf)
    if not bool(size.isfinite()):
        return
    bound = rounding(least) * size
    same = bool(largest(u - g) <= bound)
    if same and (known is None or not known.dim()):
        factors[key] = u.new_ones(())
        return
    g, u = g.double(), u.double()
    factor = now = _factor(g, u)
    if known is not None and known.shape in ((), now.shape):
        factor = torch.where(now.isnan(), known, now)
    else:
        known = now
    factors[key] = factor
    if any(bool(((u - x * g).abs() > bound).any()) for x in (now.nan_to_num(), known)):
        fisher.troubles.mark(fisher.by_layer, CHANGED.format(where))


def _factor(g: Tensor, u: Tensor) -> Tensor:
    """By what the entries of all samples alike have to be multiplied to be nearest to others; nan of zeros."""
    square = (g * g).sum(0) if g.dim() else g * g
    product = (g * u).sum(0) if g.dim() else g * u
    return torch.where(square > 0, product / square, torch.nan)
