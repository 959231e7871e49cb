"""Recording the calls of layers in passes of our own."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.engine import in_backward
from .._torch.modules import Place, parameter_places
from .._torch.pytree import map_tensors, tensors_in
from .._torch.transforms import inside_transform
from .._torch.versions import version
from ..layers.selection import Layer
from .isolation import IsolatedModel, _restore

__all__ = ["Recording", "recorded"]


class Recording:
    """What :func:`recorded` collects: per layer its calls, as inputs and the zero leaves ε of its outputs.

    Attributes:
        inputs: by layer, the input tensors of each call.
        leaves: by layer, the leaf ε of each call.
        versions: recorded inputs, to find those that are overwritten later.
        differentiated: layers through which the model took a derivative itself (``torch.autograd.grad`` or a
            ``torch.func`` transform inside of a forward or loss): their parameters then act not only through z.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, list[tuple[Tensor, ...]]] = {}
        self.leaves: dict[str, list[Tensor]] = {}
        self.versions: list[tuple[str, Tensor, int]] = []
        self.differentiated: set[str] = set()
        self.open = True

    def close(self) -> None:
        """The forward and the loss ran: derivatives taken from now on are ours."""
        self.open = False

    def unusable(self) -> set[str]:
        """Layers whose recorded calls do not tell all: input overwritten after the call, or differentiated inside."""
        overwritten = {name for name, tensor, before in self.versions if version(tensor) != before}
        return overwritten | self.differentiated


@contextmanager
def recorded(isolated: IsolatedModel, layers: Sequence[Layer], *, own_parameters: bool) -> Iterator[Recording]:
    """Record the calls of ``layers`` in the forwards run inside.

    A zero leaf ε is added to each output: differentiating with respect to it is differentiating with respect to the
    output, whatever in-place operation overwrites it later.

    Args:
        isolated: the isolated model.
        layers: the layers to record.
        own_parameters: whether a layer's forward uses its replacement parameters. Where not, it uses detached ones, and
            a replacement parameter has a gradient only by uses outside of its layer's forward: so these are found.
    """
    recording = Recording()
    handles = []
    taps = [_Tap(recording, layer, [] if own_parameters else _places(isolated, layer)) for layer in layers]
    try:
        for tap in taps:
            if not own_parameters:
                handles.append(tap.layer.enclosing.register_forward_pre_hook(tap.before, prepend=True))
            handles.append(tap.layer.enclosing.register_forward_hook(tap.after, prepend=True, with_kwargs=True))
        yield recording
    finally:
        for handle in handles:
            handle.remove()
        for tap in taps:  # where a forward was broken off
            _restore(tap.places)


class _Tap:
    """The hooks by which one layer's calls are recorded."""

    def __init__(self, recording: Recording, layer: Layer, places: list[Place]) -> None:
        self.recording, self.layer, self.places = recording, layer, places
        self.displaced: list[list[Any]] = []  # a stack: calls may nest
        self.owner = threading.get_ident()

    def foreign(self) -> bool:
        """Whether another thread runs the model (in backward, autograd's own threads are ours)."""
        return threading.get_ident() != self.owner and not in_backward()

    def before(self, module: nn.Module, _: Any) -> None:
        """Detached parameters take the place of the replacement parameters."""
        if self.foreign():
            return
        self.displaced.append([place.holder[place.key] for place in self.places])
        if inside_transform():
            return  # derivatives by torch.func pass our leaves by: to be seen as a use of the parameters themselves
        for place in self.places:
            place.put(place.value.detach())

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The call is recorded, and a leaf added to its output."""
        if self.foreign():
            return None
        if self.places:
            for place, value in zip(self.places, self.displaced.pop(), strict=True):
                place.put(value)
        recording, name = self.recording, self.layer.name
        if not recording.open and not torch.is_grad_enabled():
            return None  # a forward whose outputs alone are looked at
        leaves: list[Tensor] = []
        if not in_backward():  # a checkpoint recomputes in backward what is recorded already
            leaves = recording.leaves.setdefault(name, [])
        if inside_transform():
            recording.differentiated.add(name)
            return None
        if not in_backward():
            tensors = tuple(tensors_in((args, kwargs)))
            recording.versions.extend((name, x, version(x)) for x in tensors)
            recording.inputs.setdefault(name, []).append(tensors)
        return map_tensors(partial(self.with_leaf, leaves), output)

    def with_leaf(self, leaves: list[Tensor], tensor: Tensor) -> Tensor:
        """The tensor plus a zero leaf, which is entered in ``leaves``."""
        if not tensor.is_floating_point():
            return tensor
        leaves.append(torch.zeros_like(tensor, requires_grad=True))
        result = tensor + leaves[-1]
        if torch.is_grad_enabled():
            result.register_hook(self.watch)
        return result

    def watch(self, _: Tensor) -> None:
        """The model differentiates itself, if a gradient passes while it still runs."""
        if self.recording.open:
            self.recording.differentiated.add(self.layer.name)


def _places(isolated: IsolatedModel, layer: Layer) -> list[Place]:
    """Where the modules of a layer's enclosing module keep the replacement parameters of its parameters."""
    wanted = {id(s) for s in isolated.replacements(layer)}
    return [p for module in layer.enclosing.modules() for p in parameter_places(module) if id(p.value) in wanted]
