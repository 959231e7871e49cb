"""Norms of gradients, weights and updates, by layer."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .names import WHOLE_MODEL, shown
from .stacks import norms, stacks

__all__ = ["Norms"]


class Norms:
    """Norms of the layers' gradients and weights, and of the last update relative to the weights.

    ``gradient_norm`` is that of what training left in ``.grad``, so after clipping; ``update_to_weight`` is
    ``‖θ_t − θ_{t−1}‖ / ‖θ_t‖``, for which the weights are copied one step before. Those of the whole model are of
    all layers' parameters together, one that several layers share counted once.

    Args:
        parameters: what gives layer name → parameters, asked each time: they may be exchanged while a model trains.

    Example:
        >>> import torch
        >>> from secorder.monitor.norms import Norms
        >>> weight = torch.tensor([3.0, 4.0])
        >>> norms = Norms(lambda: {"fc": [weight]})
        >>> norms.copy_weights()
        >>> numbers = norms.numbers() if weight.mul_(1.5) is not None else {}
        >>> numbers["weight_norm"], numbers["update_to_weight"]
        ({'fc': 7.5}, {'fc': 0.3333333333333333})
    """

    def __init__(self, parameters: Callable[[], Mapping[str, Sequence[Tensor]]]) -> None:
        self._given = parameters
        self._places: dict[str, list[int]] = {}
        self._parameters: list[Tensor] = []
        self._before: list[tuple[list[int], Tensor]] | None = None
        self._gradients: dict[int, float] | None = None

    def _look(self) -> None:
        """Take over the parameters of now; what was kept of others is forgotten."""
        given, known = self._given(), dict[int, int]()
        parameters = list({id(p): p for group in given.values() for p in group}.values())
        if list(map(id, parameters)) == list(map(id, self._parameters)):
            return
        self._places = {
            shown(name): [known.setdefault(id(p), len(known)) for p in group] for name, group in given.items()
        }
        self._parameters, self._before, self._gradients = parameters, None, None

    def copy_weights(self) -> None:
        """Keep the weights of now, until :meth:`numbers` is called after the next step."""
        self._look()
        with torch.no_grad():  # what is large is told as it is, and must be copied
            self._before = [(at, rows.clone() if len(at) == 1 else rows) for at, rows in stacks(self._parameters)]

    def see_gradients(self) -> None:
        """Measure the gradients now, where they are gone when :meth:`numbers` is called."""
        self._look()
        gradients = {place: p.grad for place, p in enumerate(self._parameters) if p.grad is not None}
        self._gradients = dict(zip(gradients, norms(list(gradients.values())), strict=True))

    def numbers(self) -> dict[str, dict[str, float]]:
        """The norms of now: statistic → layer → number, and those of the whole model."""
        self._look()
        if self._gradients is None:
            self.see_gradients()
        seen = {"gradient_norm": self._gradients or {}, "weight_norm": dict(enumerate(norms(self._parameters)))}
        self._gradients = None
        by_layer = {statistic: self._by_layer(values) for statistic, values in seen.items()}
        whole = {statistic: math.hypot(*values.values()) for statistic, values in seen.items() if values}
        if self._before is not None:
            updates, self._before = norms(self._parameters, self._before), None
            sizes, moved = by_layer["weight_norm"], self._by_layer(dict(enumerate(updates)))
            by_layer["update_to_weight"] = {name: x / sizes[name] for name, x in moved.items() if sizes[name] > 0}
            if whole["weight_norm"] > 0:
                whole["update_to_weight"] = math.hypot(*updates) / whole["weight_norm"]
        return {**by_layer, WHOLE_MODEL: whole}

    def _by_layer(self, values: Mapping[int, float]) -> dict[str, float]:
        """Of each layer, the norm of those of its tensors that have one, together."""
        groups = {name: [values[at] for at in places if at in values] for name, places in self._places.items()}
        return {name: math.hypot(*group) for name, group in groups.items() if group}
