"""Layers that no recorded forward has called: their curvature is zero unless something else trains them.

A method that is called in place of the model (``agent.get_value(x)``) runs no hook of it, and its backward is none of
the model's: what it leaves in ``.grad`` may be cleared before the next recorded one. What shows is that the parameters
move.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._torch.fsdp import local
from .._torch.versions import version
from ..layers.selection import Layer
from .record import slot

__all__ = ["Uncalled"]


class Uncalled:
    """What the parameters of such layers were when they were last looked at.

    Args:
        layers: all that are looked at, before anything is recorded.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._left = {id(p): slot(p) for layer in layers for p in layer.parameters.values() if p.grad is not None}
        self._seen: dict[tuple[str, str], tuple[int, Tensor]] = {}

    def trained(self, parameter: Tensor) -> bool:
        """Whether anything has come into ``.grad`` beside what was left there before."""
        return slot(parameter) != self._left.get(id(parameter))

    def moved(self, layers: Sequence[Layer], called: Iterable[str]) -> list[tuple[int, Tensor]]:
        """Whether parameters have other values than before, with the number of the layer; nothing is read on the host.

        Args:
            called: names of those that were called.
        """
        called = set(called)
        if len(called) >= len(layers):
            return []
        trained = {id(p) for layer in layers if layer.name in called for p in layer.parameters.values()}
        found = []
        for index, layer in enumerate(layers):
            for name, p in layer.parameters.items() if layer.name not in called else ():
                before = self._seen.get((layer.name, name))
                if id(p) in trained or not p.requires_grad or p.is_meta or (before and before[0] == version(p)):
                    continue
                with torch.no_grad():
                    total = local(p.detach()).sum()
                self._seen[layer.name, name] = (version(p), total)
                if before is not None:
                    found.append((index, before[1].to(total) != total))
        return found
