"""Iterators that a model holds (of a data loader, a counter): from some, what was taken cannot be put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..._torch.modules import Place, own_attributes, put_back
from ...oneshot.restoring import used_up

HOLDS = (
    "the model holds an iterator, its attribute {!r}, which running the model once more to see where samples are would "
    "use up: call the model with what that yields, or attach the probe to the part that is called with tensors"
)


class Held:
    """What stands in the place of the iterators: nothing is taken from these, and it is known who wanted to."""

    def __init__(self) -> None:
        self.wanted = ""  #: the name of one that the model takes from


class _Guard:
    def __init__(self, held: Held, name: str) -> None:
        self._held, self._name = held, name

    def __iter__(self) -> "_Guard":
        return self

    def __next__(self) -> Any:
        self._held.wanted = self._name
        raise RuntimeError(f"{self._name} is not to be taken from")


@contextmanager
def iterators_kept(model: nn.Module) -> Iterator[Held]:
    """Inside, a forward that takes from an iterator that the model holds fails, and leaves it as it was."""
    held, places = Held(), {}
    for name, module in model.named_modules():
        for key, value in own_attributes(module).items():
            if used_up(value):
                places[f"{name}.{key}".lstrip(".")] = Place(vars(module), key, value)
    try:
        for name, place in places.items():
            place.put(_Guard(held, name))
        yield held
    finally:
        put_back(places.values())
