"""Recording the calls of layers in passes of our own."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.engine import backward_since, current_backward
from .._torch.graph import leaves_of
from .._torch.modules import Place, parameter_places, put_back
from .._torch.onednn import linear_by_onednn
from .._torch.own_hooks import outputs_seen
from .._torch.pytree import map_tensors, tensors_in
from .._torch.surroundings import assigned, inside_transform
from .._torch.versions import same_memory, version
from .._torch.views import is_view
from .._torch.vjp import gradients, placeholder
from ..errors import AttributionError, SecorderError
from ..layers.selection import Layer
from .isolation import IsolatedModel, ReplacementsBypassed, parameter_like
from .overwriting import LossOverwrites


class RecordingFailed(Exception):
    """The model or the loss raised with detached parameters in the layers' calls: perhaps it differentiates by them."""


class Recording:
    """What :func:`recorded` collects: per layer its calls, as inputs and the zero leaves ε of its outputs."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[tuple[Tensor, ...]]] = {}  #: by layer, the input tensors of each call
        self.leaves: dict[str, list[Tensor]] = {}  #: by layer, the leaf ε of each call
        self.versions: list[tuple[str, Tensor, int]] = []  #: recorded inputs, to find those that are overwritten later
        self.watch = _Watch()  #: whether calls are still recorded, and which layers the model differentiates itself
        #: layers that were called with other parameters than their own, which may be made of these
        self.with_others: set[str] = set()
        self.without_graph: set[str] = set()  #: layers that were called where no gradients were wanted
        self.hidden: set[str] = set()  #: layers of these that ran again, with gradients, inside of a backward pass
        self.pauses = False  #: whether forwards run that are not to be recorded

    def paused(self) -> AbstractContextManager[None]:
        """Inside, forwards run as they are, also where a checkpoint runs them again in their backward passes."""
        return assigned([self], pauses=True)

    def close(self) -> None:
        """The forward and the loss ran: what is differentiated, or called, from now on is work of ours."""
        self.watch.open = False

    def note(self, name: str, outer: int) -> None:
        """Of a layer that runs, take down whether it hides; ``outer`` is the backward that ran before all, if any."""
        if not torch.is_grad_enabled():
            self.without_graph.add(name)
        elif backward_since(outer) and name in self.without_graph:
            self.hidden.add(name)

    def unusable(self) -> set[str]:
        """Layers whose recorded calls do not tell all.

        Their input is overwritten after the call, or they are differentiated inside, or called with other parameters.
        """
        overwritten = {name for name, tensor, before in self.versions if version(tensor) != before}
        return overwritten | self.watch.differentiated | self.with_others

    def require_seen(self, loss: Tensor) -> None:
        """Raise if a layer ran without a graph, and runs again with one inside of the loss's whole backward pass.

        So do checkpoints that run a backward of their own, which hides the layer from ours.
        """
        if self.without_graph and loss.requires_grad:
            gradients(loss, list(leaves_of([loss]).values()))
        if self.hidden:
            raise AttributionError(
                f"layer {min(self.hidden)!r} runs inside a function that starts a backward pass of its own (a "
                "reentrant checkpoint, reversible layers), which hides it from torch.autograd.grad: use "
                "torch.utils.checkpoint.checkpoint with use_reentrant=False, or let a probe measure its Fisher in "
                "training."
            )


class _Watch:
    """What hooks on tensors may hold on to: no tensor, and nothing that leads to one.

    A hook that leads to a tensor of the graph that it hangs on closes a cycle through C++, which is never freed.
    """

    def __init__(self) -> None:
        self.open = True  #: whether calls are still recorded
        #: which layers the model took a derivative through itself (``torch.autograd.grad`` or a ``torch.func``
        #: transform inside of a forward or loss): their parameters then act not only through z
        self.differentiated: set[str] = set()

    def seen(self, name: str, _: Tensor) -> None:
        """The model differentiates itself, if a gradient passes while it still runs."""
        if self.open:
            self.differentiated.add(name)


def is_watch(hook: Any) -> bool:
    """Whether a hook on a tensor is a recording's own, which changes nothing."""
    return isinstance(hook, partial) and isinstance(getattr(hook.func, "__self__", None), _Watch)


@contextmanager
def recorded(isolated: IsolatedModel, layers: Sequence[Layer], *, own_parameters: bool) -> Iterator[Recording]:
    """Record the calls of ``layers`` in the forwards run inside.

    A zero leaf ε is added to each output: differentiating with respect to it is differentiating with respect to the
    output, whatever in-place operation overwrites it later. Without ``own_parameters`` a layer's forward uses detached
    ones, so that replacement parameters have a gradient only by uses outside of it; where that makes model or loss
    fail, :class:`RecordingFailed` is raised.
    """
    recording = Recording()
    taps = [_Tap(recording, x, [] if own_parameters else _places(isolated, x)) for x in layers]
    try:
        with ExitStack() as hooks:
            for tap in taps:
                module = tap.layer.enclosing
                if not own_parameters:
                    hooks.enter_context(module.register_forward_pre_hook(tap.before, prepend=True))
                hooks.enter_context(module.register_forward_hook(tap.after, prepend=True, with_kwargs=True))
            yield recording
    except (SecorderError, ReplacementsBypassed, LossOverwrites):
        raise
    except Exception as error:
        if recording.watch.open and any(tap.places for tap in taps):
            raise RecordingFailed from error
        raise
    finally:
        for tap in taps:  # where a forward was broken off
            put_back(tap.places)


@contextmanager
def seen(layers: Sequence[Layer]) -> Iterator[Recording]:
    """Records of layers nothing but whether they hide: of such come no gradients, and they would pass for unused."""
    recording, outer = Recording(), current_backward()

    with outputs_seen([(x.name, x.enclosing) for x in layers], lambda name, _: recording.note(name, outer)):
        yield recording


class ChainForward:
    """Runs a chain of modules one after the other, as ``nn.Sequential`` does, and records the layers' calls: no hooks.

    Nothing is added to their outputs either; ε stands for them in the graph, which leads to no parameter. With
    ``onednn`` linear layers may be computed by other means, which round otherwise.
    """

    def __init__(
        self, recording: Recording, modules: Sequence[nn.Module], layers: Sequence[Layer], *, onednn: bool
    ) -> None:
        self.recording, self.modules, self.onednn = recording, modules, onednn
        self.names = {layer.module: layer.name for layer in layers}

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the last one."""
        recording, names = self.recording, self.names
        for module in self.modules:
            a, x = x, _called(module, x) if self.onednn else module(x)
            if module in names:
                name = names[module]
                recording.inputs.setdefault(name, []).append((a,))
                recording.versions.append((name, a, version(a)))
                if x.grad_fn is not None and not is_view(x):
                    leaf = placeholder(x.grad_fn, x.output_nr)
                else:
                    leaf = _leaf(x)
                    x = x + leaf
                recording.leaves.setdefault(name, []).append(leaf)
        return x


def _called(module: nn.Module, x: Tensor) -> Any:
    """What a module makes of x; a linear layer by oneDNN, where that is faster."""
    found = linear_by_onednn(x, module.weight, module.bias) if type(module) is nn.Linear else None
    return module(x) if found is None else found


def _leaf(like: Tensor) -> Tensor:
    """A zero leaf ε of a shape, which takes no memory."""
    return like.new_zeros(()).expand(like.shape).requires_grad_(True)


class _Tap:
    """The hooks by which one layer's calls are recorded."""

    def __init__(self, recording: Recording, layer: Layer, places: list[Place]) -> None:
        self.recording, self.layer, self.places = recording, layer, places
        self.detached = [parameter_like(p.value, p.value.detach(), requires_grad=False) for p in places]
        self.displaced: list[list[Any]] = []  # a stack: calls may nest
        self.owner = threading.get_ident()
        self.outer = current_backward()

    def recomputing(self) -> bool:
        """Whether a backward runs that has begun since (a checkpoint may run the model in one of the user's)."""
        return backward_since(self.outer)

    def foreign(self) -> bool:
        """Whether another thread runs the model (in backward, autograd's own threads are ours)."""
        return threading.get_ident() != self.owner and not self.recomputing()

    def idle(self) -> bool:
        """Whether the calls are of no interest any more: such as those of a loss that is computed once more."""
        return self.recording.pauses or (not self.recording.watch.open and not self.recomputing())

    def before(self, module: nn.Module, _: Any) -> None:
        """Detached parameters take the place of the replacement parameters."""
        if self.foreign() or self.idle():
            return
        displaced = [place.held() for place in self.places]
        self.displaced.append(displaced)
        if inside_transform():
            return  # derivatives by torch.func pass our leaves by: to be seen as a use of the parameters themselves
        known = zip(displaced, self.places, self.detached, strict=True)
        if not all(held is place.value or held is value for held, place, value in known):
            return  # others have their places already, as torch.func.functional_call puts them there
        for place, value, held in zip(self.places, self.detached, displaced, strict=True):
            if not same_memory(value, held):  # the forward has put other memory in the parameter
                value.data = held.data
            place.put(value)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The call is recorded, and a leaf added to its output."""
        if self.foreign() or self.idle():
            return None
        recording, name = self.recording, self.layer.name
        if self.places:
            if any(place.held() is not value for place, value in zip(self.places, self.detached, strict=True)):
                recording.with_others.add(name)
            for place, value in zip(self.places, self.displaced.pop(), strict=True):
                place.put(value)
        if not recording.watch.open and not torch.is_grad_enabled():
            return None  # a forward whose outputs alone are looked at
        leaves: list[Tensor] = []
        if not self.recomputing():  # a checkpoint recomputes in backward what is recorded already
            leaves = recording.leaves.setdefault(name, [])
        if inside_transform():
            recording.watch.differentiated.add(name)
            return None
        recording.note(name, self.outer)
        if not self.recomputing():
            tensors = tuple(tensors_in((args, kwargs) if kwargs else args))
            recording.versions.extend((name, x, version(x)) for x in tensors)
            recording.inputs.setdefault(name, []).append(tensors)
        return map_tensors(partial(self.with_leaf, leaves), output)

    def with_leaf(self, leaves: list[Tensor], tensor: Tensor) -> Tensor:
        """The tensor plus a zero leaf, which is entered in ``leaves``; or as it is, with what stands for it there."""
        if not tensor.is_floating_point():
            return tensor
        if tensor.is_nested:
            raise AttributionError(
                f"layer {self.layer.name!r} returns a nested tensor, which has no dimension that samples could be "
                "found in: let it compute with padded ones, or leave the layer out with layers=."
            )
        leaf = _leaf(tensor)
        leaves.append(leaf)
        result = tensor + leaf
        if torch.is_grad_enabled():
            result.register_hook(partial(self.recording.watch.seen, self.layer.name))
        return result


def _places(isolated: IsolatedModel, layer: Layer) -> list[Place]:
    """Where the modules of a layer's enclosing module keep the replacement parameters of its parameters."""
    wanted = {id(s) for s in isolated.replacements(layer)}
    return [p for module in layer.enclosing.modules() for p in parameter_places(module) if id(p.value) in wanted]
