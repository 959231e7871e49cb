"""The hooks on a live model: they turn one forward and backward of a layer into its inputs ``a`` and gradient ``g``.

Capture knows no curvature. It hands every layer's calls of one backward pass to a function given by its owner:
``receive(layer, calls, layouts, num_samples)`` with ``calls`` a list of ``(inputs, g)``, or, for layers whose own
calls do not do, a list of :class:`ModuleCall`, of a module that they are parts of.

What it relies on, and why:

- ``Tensor.register_hook`` on a layer's output gives dL/dz and survives in-place operations after the layer.
- The inputs are kept as autograd keeps its saved tensors, so that activation checkpointing may free and recompute them,
  and a graph that is dropped drops them too.
- Only a backward that accumulates into the parameters counts: ``torch.autograd.grad`` on the same graph does not.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._torch.autocast import no_autocast
from .._torch.engine import (
    accumulate_node,
    accumulates_into,
    after_backward,
    current_backward,
    in_backward,
    will_accumulate,
)
from .._torch.own_hooks import OwnHook
from .._torch.pytree import map_tensors, tensors_in
from .._torch.random_state import cuda_devices
from .._torch.saved_tensors import Kept, OverwrittenError, keep
from .._torch.transforms import inside_transform
from ..errors import AttributionError
from ..layers.selection import Layer
from .calls import Forward, ModuleCall, Receiver, Start

__all__ = ["Capture"]


class Capture:
    """Hooks on the layers of a model, and on the model itself to know where a forward begins.

    Args:
        model: the model whose forward is a batch.
        layers: the layers to capture.
        every: record each ``every``-th forward in training, counted apart for train and eval mode.
        receiver: who is told.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], every: int, receiver: Receiver) -> None:
        self.model = model
        self.layers = {layer.name: layer for layer in layers}
        self.enclosing: dict[
            str, list[Layer]
        ] = {}  # layers without a rule, by the name of the first that has their enclosing
        self.every = every
        self.receiver = receiver
        self.suspensions = 0
        #: Layers that ran in a recorded forward with nothing to differentiate: all frozen up to there.
        self.without_gradient: set[str] = set()
        #: Forwards counted towards ``every``, in train and in eval mode.
        self.counts = {True: 0, False: 0}
        self._threads = threading.local()  # models may run inference in another thread meanwhile
        self._open: tuple[int | None, Forward] | None = None  # the backward that runs now: its graph task, its forward
        self._whole: dict[int, Tensor] = {}  # whole gradients of the parameters in the backward that runs now
        self._watches: list[RemovableHandle] = []
        self._handles: list[RemovableHandle] = []
        self._layer_handles: list[RemovableHandle] = []
        self._leaf = torch.empty(0, requires_grad=True)
        self.cuda = cuda_devices(model)
        self._device_type = next((p.device.type for p in model.parameters()), "cpu")
        self.autocast_dtype: torch.dtype | None = None  # of the latest recorded call
        self.module_starts: dict[str, Start] = {}
        #: Of sharded layers, the whole parameters that FSDP2 puts into the module while it runs.
        self._gathered: dict[str, dict[str, Any]] = {}

    def attach(self) -> None:
        """Register the hooks."""
        self._target(list(self.layers.values()))
        self._handles.append(self.model.register_forward_pre_hook(_Begin(self), prepend=True, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(_End(self), always_call=True))

    def _target(self, layers: Sequence[Layer]) -> None:
        """Capture the layers' enclosing from now on."""
        for handle in self._layer_handles:
            handle.remove()
        self._layer_handles = handles = []
        self.layers = {layer.name: layer for layer in layers}
        self.enclosing = {}
        first_of: dict[int, str] = {}
        for layer in layers:
            if layer.rule is not None:
                hook = _Called(self, layer)
                handles.append(layer.enclosing.register_forward_hook(hook, prepend=True, with_kwargs=True))
            else:
                self.enclosing.setdefault(first_of.setdefault(id(layer.enclosing), layer.name), []).append(layer)
        for key, parts in self.enclosing.items():
            enclosing = parts[0].enclosing
            handles.append(enclosing.register_forward_hook(_ModuleCalled(self, key), prepend=True, with_kwargs=True))
            if enclosing is not self.model:  # whose start begin() sees
                starts = _ModuleStarts(self, key)
                handles.append(enclosing.register_forward_pre_hook(starts, prepend=True, with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook; backward passes of graphs recorded before are ignored from now on."""
        for handle in (*self._handles, *self._layer_handles):
            handle.remove()
        self._handles.clear()
        self._layer_handles.clear()
        self._gathered.clear()
        self.suspensions += 1
        self._current = self._open = None
        self._stop_watching()

    @property
    def _current(self) -> "Forward | None":
        """The forward that runs now in this thread, if it is recorded."""
        return getattr(self._threads, "forward", None)

    @_current.setter
    def _current(self, forward: "Forward | None") -> None:
        self._threads.forward = forward

    # ---- forward

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's forward starts."""
        if in_backward():
            return  # a checkpoint recomputes the whole model
        if self.suspensions:
            return
        self._current = None
        if inside_transform() or not torch.is_grad_enabled():
            return
        self._open = None
        self._stop_watching()
        count = self.counts[self.model.training]
        self.counts[self.model.training] = count + 1
        if count % self.every == 0:
            layers, num_samples = self.receiver.prepare(args, kwargs)
            if list(layers) != list(self.layers.values()):
                self._target(layers)
            if num_samples < 0:
                return
            self._current = Forward(num_samples)
            for key, parts in self.enclosing.items():
                if parts[0].enclosing is self.model:
                    self.module_starts[key] = Start(self, args, kwargs)

    def end(self, output: Any) -> None:
        """The model's forward ended, perhaps by an exception."""
        if self.suspensions:
            return
        forward, self._current = self._current, None
        if forward is None or in_backward():
            return
        if output is not None and not self.receiver.expected(forward.calls):
            forward.done = True
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                # Opens the backward before any layer is reached: under reentrant checkpointing, layers run inside.
                tensor.register_hook(lambda _: self._enter(forward))

    def _recording(self, key: str, parts: Sequence[Layer], tensors: Sequence[Tensor]) -> tuple[Forward, int] | None:
        """The forward that a call with these outputs belongs to and the call's number in it, if it is recorded."""
        if inside_transform():
            return None
        recomputed = in_backward()  # by a checkpoint, inside backward
        forward = (self._open[1] if self._open else None) if recomputed else self._current
        if forward is None:
            return None
        if torch.is_autocast_enabled(self._device_type):
            self.autocast_dtype = torch.get_autocast_dtype(self._device_type)
        index = forward.calls.get(key, 0)
        if recomputed:
            index = max(0, index - 1)
        else:
            forward.calls[key] = index + 1
        if not torch.is_grad_enabled():
            return None
        if not any(t.requires_grad for t in tensors):
            if not any(p.requires_grad for layer in parts for p in layer.parameters.values()):
                self.without_gradient.update(layer.name for layer in parts)
            return None
        return forward, index

    def called(self, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A layer with a rule ran."""
        recording = self._recording(layer.name, (layer,), (output,))
        if recording is None:
            return
        forward, index = recording
        kept = [keep(inputs)]
        if layer.sharded:
            own = dict(layer.module.named_parameters(recurse=False, remove_duplicate=False))
            self._gathered[layer.name] = {local: own[local] for local in layer.parameters}
        node = accumulates_into(self._parameters(layer).values(), output)

        def on_gradient(g: Tensor) -> None:
            if kept and self._counts_in((layer,), node):
                self._record(forward, layer, index, kept.pop(), g)

        output.register_hook(on_gradient)

    def _parameters(self, layer: Layer) -> dict[str, Any]:
        """The layer's parameters as the autograd graph knows them."""
        return self._gathered.get(layer.name, layer.parameters)

    def module_called(self, key: str, start: "Start", output: Any) -> None:
        """A module ran whose parts are layers without a rule."""
        parts = self.enclosing[key]
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]
        recording = self._recording(key, parts, tensors)
        if recording is None:
            return
        forward, index = recording
        for layer in parts[1:]:
            forward.calls[layer.name] = forward.calls[key]
        start.require_untouched(parts)
        kept = [keep(tensors_in(start.arguments))]
        arguments = map_tensors(lambda t: t.new_empty(0), start.arguments)
        call = ModuleCall(arguments, start.random_state, start.autocast, index, gradients=[None] * len(tensors))

        def on_gradient(position: int, g: Tensor) -> None:
            if forward.done and not kept:
                return
            if not self._counts_in(parts):
                return
            if kept:
                self._open_for(forward, parts[0])
                call.tensors = self._unpack(parts[0], kept.pop())
                forward.captured_modules.setdefault(key, []).append(call)
            if call.gradients[position] is None:
                call.gradients[position] = g.detach()

        for position, tensor in enumerate(tensors):
            if tensor.requires_grad:
                tensor.register_hook(partial(on_gradient, position))

    # ---- backward

    def _counts_in(self, layers: Sequence[Layer], node: Any = None) -> bool:
        """Whether this backward is a training step of the layers, reaching ``.grad`` of one of their parameters.

        For frozen layers: of any of the model's. ``node`` is where a parameter's gradient is accumulated, if known.
        """
        if self.suspensions or inside_transform():
            return False
        if node is not None:
            return will_accumulate(node)
        own = [p for layer in layers for p in self._parameters(layer).values() if p.requires_grad]
        return any(
            will_accumulate(accumulate_node(parameter))
            for parameter in own or self.model.parameters()
            if parameter.requires_grad
        )

    def _enter(self, forward: Forward) -> None:
        task = current_backward()
        if self.suspensions or inside_transform() or forward.done:
            return
        if self._open is not None and self._open[1] is not forward and self._open[0] == task:
            raise AttributionError(
                "one backward runs through two forwards of the model, so that samples cannot be told apart: call "
                "backward once per forward, or run the parts under probe.paused()."
            )
        if self._open is None or self._open[1] is not forward:
            self._open = (task, forward)
            if self.receiver.wants_gradients():
                self._watch()
            after_backward(lambda: self._leave(forward))

    def _watch(self) -> None:
        """Keep the whole gradient of each layer's parameters, as it is about to be accumulated."""
        self._stop_watching()
        for layer in self.layers.values():
            for local, parameter in self._parameters(layer).items():
                if parameter.requires_grad:
                    keep = partial(self._keep_whole, id(layer.parameters[local]))
                    self._watches.append(accumulate_node(parameter).register_prehook(keep))

    def _keep_whole(self, key: int, gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None and not self.suspensions:
            self._whole[key] = gradients[0].detach().clone()

    def _stop_watching(self) -> None:
        for handle in self._watches:
            handle.remove()
        self._watches.clear()
        self._whole = {}

    def _open_for(self, forward: Forward, layer: Layer) -> None:
        if forward.done:
            raise AttributionError(
                f"layer {layer.name!r} got its gradient in a second backward through one forward, after its samples "
                "were counted without it: add the losses and call backward once."
            )
        self._enter(forward)

    def _unpack(self, layer: Layer, kept: Kept) -> tuple[Tensor, ...]:
        try:
            return kept.tensors()
        except OverwrittenError as error:
            raise AttributionError(
                f"the input of layer {layer.name!r} was overwritten in place before backward: use an out-of-place "
                "operation after it, or leave the layer out with layers=."
            ) from error

    def _record(self, forward: Forward, layer: Layer, index: int, kept: Any, g: Tensor) -> None:
        self._open_for(forward, layer)
        inputs = self._unpack(layer, kept)
        if layer.name in forward.received:
            raise AttributionError(
                f"layer {layer.name!r} was called again after its gradient was complete (a module used in several "
                "reentrant checkpoints): use torch.utils.checkpoint with use_reentrant=False."
            )
        forward.captured.setdefault(layer.name, []).append((index, (inputs, g.detach())))
        if forward.calls.get(layer.name, 0) == 1:
            self._deliver(forward, layer)

    def _deliver(self, forward: Forward, layer: Layer) -> None:
        calls = forward.captured.pop(layer.name)
        layouts = [self.receiver.layouts(layer, index, [call[1]], forward.num_samples)[0] for index, call in calls]
        self._hand_over(self.receiver.receive, layer, [call for _, call in calls], layouts, forward.num_samples)
        forward.received.add(layer.name)

    def _deliver_module(self, forward: Forward, key: str) -> None:
        calls, parts = forward.captured_modules.pop(key), self.enclosing[key]
        for call in calls:
            call.layouts = self.receiver.layouts(parts[0], call.index, call.gradients, forward.num_samples)
        self._hand_over(self.receiver.receive_module, parts, calls, forward.num_samples)
        forward.received.update(layer.name for layer in parts)

    def _hand_over(self, receive: Callable[..., None], *arguments: Any) -> None:
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self._device_type):  # backward inside either context
            with torch.no_grad(), no_autocast():
                receive(*arguments)
        else:
            receive(*arguments)

    def _leave(self, forward: Forward) -> None:
        if self._open is not None and self._open[1] is forward:
            self._open = None
        whole = self._whole
        self._stop_watching()
        if self.suspensions or forward.done:
            return
        for name in list(forward.captured):
            self._deliver(forward, self.layers[name])
        for key in list(forward.captured_modules):
            self._deliver_module(forward, key)
        if forward.received or whole:
            forward.done = True
            self._hand_over(self.receiver.finish, forward.num_samples, forward.received, whole)


class _Begin(OwnHook):
    def run(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.owner.begin(args, kwargs)


class _End(OwnHook):
    def run(self, module: nn.Module, args: Any, output: Any) -> None:
        self.owner.end(output)


class _Called(OwnHook):
    def __init__(self, capture: Capture, layer: Layer) -> None:
        super().__init__(capture)
        self.layer = layer

    def run(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.owner.suspensions:
            plain = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
            self.owner.called(self.layer, args if plain else tuple(tensors_in((args, kwargs))), output)


class _ModuleStarts(OwnHook):
    def __init__(self, capture: Capture, key: str) -> None:
        super().__init__(capture)
        self.key = key

    def run(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.owner.suspensions and torch.is_grad_enabled() and not inside_transform():
            self.owner.module_starts[self.key] = Start(self.owner, args, kwargs)


class _ModuleCalled(OwnHook):
    def __init__(self, capture: Capture, key: str) -> None:
        super().__init__(capture)
        self.key = key

    def run(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        start = self.owner.module_starts.pop(self.key, None)
        if start is not None and not self.owner.suspensions:
            self.owner.module_called(self.key, start, output)
