"""Layers that no recorded forward has called: their curvature is zero unless something else trains them.

A method that is called in place of the model (``agent.get_value(x)``) runs no hook of it, and its backward is none of
the model's: what it leaves in ``.grad`` may be cleared before the next recorded one. What shows is that the parameters
move: otherwise than by weight decay, which multiplies all of them by one number.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.fsdp import local
from ..._torch.versions import version
from ...layers.selection import Layer
from ..record import slot

#: What passes for rounding where all elements are multiplied by one number, in units in the last place, and the largest
#: such unit.
UNITS, LARGEST = 8, 1e-5


class Uncalled:
    """What the parameters of such layers were when they were last looked at, first before anything is recorded."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._left = {id(p): (slot(p), version(p)) for layer in layers for p in layer.parameters.values()}
        self._seen: dict[tuple[str, str], _Seen] = {}

    def trained(self, parameter: Tensor) -> bool:
        """Whether anything has come into ``.grad`` beside what was left there before."""
        left, _ = self._left.get(id(parameter), (None, 0))
        return slot(parameter) != left

    def changed(self, parameter: Tensor) -> bool:
        """The same, or it has been written to, as by steps of training whose gradients are gone."""
        return (slot(parameter), version(parameter)) != self._left.get(id(parameter))

    def moved(self, layers: Sequence[Layer], called: Iterable[str]) -> list[tuple[int, Tensor]]:
        """Whether parameters have moved since they were looked at, by the number of the layer; nothing is read."""
        called = set(called)
        if len(called) >= len(layers):
            return []
        trained = {id(p) for layer in layers if layer.name in called for p in layer.parameters.values()}
        found = []
        for index, layer in enumerate(layers):
            own = {} if layer.name in called else layer.parameters
            seen = {
                name: _Seen.of(local(p.detach()))
                for name, p in own.items()
                if id(p) not in trained and p.requires_grad and not p.is_meta
            }
            before = {name: self._seen.get((layer.name, name)) for name in seen}
            self._seen.update([((layer.name, name), now) for name, now in seen.items()])
            pairs = [(then, seen[name]) for name, then in before.items() if then is not None]
            found += [(index, moved) for moved in _moved(pairs)]
        return found


class _Seen(NamedTuple):
    """What is kept of a parameter."""

    total: Tensor  #: the sum of its elements, float64
    norm: Tensor  #: theirs, float64
    numel: int  #: how many there are
    eps: float  #: of their dtype

    @classmethod
    def of(cls, parameter: Tensor) -> "_Seen":
        """Of a parameter as it is now."""
        with torch.no_grad():
            norm = torch.linalg.vector_norm(parameter, dtype=torch.float64)
            return cls(parameter.sum(dtype=torch.float64), norm, parameter.numel(), torch.finfo(parameter.dtype).eps)


def _moved(pairs: Sequence[tuple[_Seen, _Seen]]) -> Iterator[Tensor]:
    """Whether each of a layer's parameters is more than another multiple of what it was, or of another one than it.

    A parameter of one number is a multiple of any other: it is to be the same as that of the layer's largest one. Where
    rounding might hide a step of training, multiples are not asked for.
    """
    largest = max((now.numel for _, now in pairs), default=0)
    then, now = next(((x, y) for x, y in pairs if y.numel == largest), (None, None))
    for before, seen in pairs:
        total, norm = before.total.to(seen.total), before.norm.to(seen.norm)
        other = (seen.total != total) | (seen.norm != norm)
        if seen.eps <= LARGEST and largest > 1:
            assert then is not None
            assert now is not None
            was, is_now = (norm, seen.norm) if seen.numel > 1 else (then.norm.to(total), now.norm)
            bound = UNITS * seen.eps * was * (is_now + seen.total.abs())
            other = other & ((seen.total * was - total * is_now).abs() > bound)
        yield other
