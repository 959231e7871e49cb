"""Backward hooks of the user's on modules: do they change gradients by more than constant factors?

They are for the user's backward, so that passes of our own call none of them: what they do is seen where they do it.
"""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from .._torch.modules import backward_hook_dicts
from ..layers.dtypes import rounding

if TYPE_CHECKING:
    from .fisher import OnlineFisher

#: By hook and gradient, what the entries of each sample were multiplied by.
Factors = dict[tuple[int, int, int], Tensor]

CHANGED = (
    "a backward hook on a module of type {} changes gradients by more than constant factors (it clamps or normalises "
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
        here = {watched.args[-1] for *_, watched in self._places}
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
        fisher.troubles.guarded(None, fisher.sums, _compare, fisher, factors, place, module, gradients[0], found)
    return found


def _compare(
    fisher: "OnlineFisher", factors: Factors, place: tuple[int, int], module: nn.Module, before: Any, after: Any
) -> None:
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (before, after)), strict=False)
    for index, (g, u) in enumerate(pairs):
        if isinstance(g, Tensor) and isinstance(u, Tensor) and g is not u and g.numel() and g.shape == u.shape:
            known = factors.get((*place, index))
            factor = factors[(*place, index)] = _factor(g.detach().double(), u.detach().double())
            bound = rounding(g.dtype)
            apart = known is not None and known.shape == factor.shape and not torch.allclose(known, factor, rtol=bound)
            if apart or bool(((u.double() - factor * g.double()).abs() > bound * u.abs().amax()).any()):
                fisher.troubles.mark(fisher.sums, CHANGED.format(type(module).__name__))


def _factor(g: Tensor, u: Tensor) -> Tensor:
    """By what the entries of all samples alike have to be multiplied to be nearest to others."""
    square = (g * g).sum(0) if g.dim() else g * g
    product = (g * u).sum(0) if g.dim() else g * u
    return torch.where(square > 0, product / square, 0.0)
