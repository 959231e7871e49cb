"""The hooks on a live model: they turn one forward and backward of a layer into its inputs ``a`` and gradient ``g``.

Capture knows no curvature. It hands every layer's calls of one backward pass to a function given by its owner:
``receive(layer, calls, num_samples)`` with ``calls`` a list of ``(inputs, g)``.

What it relies on, and why:

- ``Tensor.register_hook`` on a layer's output gives dL/dz and survives in-place operations after the layer.
- The inputs are kept by autograd's own saved tensors (``_Keep``), not by a Python closure, so that activation
  checkpointing may free and recompute them, and a graph that is dropped drops them too.
- Only a backward that accumulates into the parameters counts: ``torch.autograd.grad`` on the same graph does not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .errors import AttributionError
from .layers import Layer
from .trees import first_batch_size, tensors_in

__all__ = ["Call", "Capture", "CaptureHook", "suspended"]

#: One use of a layer: the tensors it was called with, and the gradient on its output.
Call = tuple[tuple[Tensor, ...], Tensor]


class _Keep(torch.autograd.Function):
    """Saves tensors in the autograd graph, on a leaf of its own so that no reference cycle forms."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # never part of a backward pass
        raise AssertionError


@dataclass(eq=False)
class _Forward:
    """One recorded forward of the model, and what its backward has brought so far."""

    num_samples: int
    calls: dict[str, int] = field(default_factory=dict)
    captured: dict[str, list[Call]] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    done: bool = False


class Capture:
    """Hooks on the layers of a model, and on the model itself to know where a forward begins.

    Args:
        model: the model whose forward is a batch.
        layers: layers with a rule.
        every: record each ``every``-th forward in training, counted apart for train and eval mode.
        receive: called during backward with a layer, all its calls and the number of samples.
        finish: called once at the end of a recorded backward with the number of samples and the names received.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        every: int,
        receive: Callable[[Layer, list[Call], int], None],
        finish: Callable[[int, set[str]], None],
    ) -> None:
        self.model = model
        self.layers = {layer.name: layer for layer in layers}
        self.every = every
        self.receive = receive
        self.finish = finish
        self.suspensions = 0
        #: Layers that ran in a recorded forward with nothing to differentiate: all frozen up to there.
        self.without_gradient: set[str] = set()
        self.forwards_seen = 0
        self._counts = {True: 0, False: 0}
        self._current: _Forward | None = None  # the forward that runs now, if it is recorded
        self._open: tuple[int, _Forward] | None = None  # the backward that runs now: its graph task, its forward
        self._handles: list[RemovableHandle] = []
        self._leaf = torch.empty(0, requires_grad=True)

    def attach(self) -> None:
        """Register the hooks."""
        for layer in self.layers.values():
            hook = _Called(self, layer)
            self._handles.append(layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._handles.append(self.model.register_forward_pre_hook(_Begin(self), prepend=True, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(_End(self), always_call=True))

    def detach(self) -> None:
        """Remove every hook; backward passes of graphs recorded before are ignored from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.suspensions += 1
        self._current = self._open = None

    # ---- forward

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's forward starts."""
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint recomputes the whole model
        self._open = None
        self._current = None
        if self.suspensions or _inside_transform() or not torch.is_grad_enabled():
            return
        self.forwards_seen += 1
        count = self._counts[self.model.training]
        self._counts[self.model.training] = count + 1
        if count % self.every == 0:
            self._current = _Forward(first_batch_size((args, kwargs)))

    def end(self, output: Any) -> None:
        """The model's forward ended, perhaps by an exception."""
        forward, self._current = self._current, None
        if forward is None or torch._C._current_graph_task_id() != -1:
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                # Opens the backward before any layer is reached: under reentrant checkpointing, layers run inside.
                tensor.register_hook(lambda _: self._enter(forward))

    def called(self, layer: Layer, inputs: tuple[Tensor, ...], output: Any) -> None:
        """A layer ran."""
        if _inside_transform():
            return
        recomputed = torch._C._current_graph_task_id() != -1
        forward = (self._open[1] if self._open else None) if recomputed else self._current
        if forward is None:
            return
        if not recomputed:
            forward.calls[layer.name] = forward.calls.get(layer.name, 0) + 1
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            if not any(p.requires_grad for p in layer.parameters.values()):
                self.without_gradient.add(layer.name)
            return
        kept = [_Keep.apply(self._leaf, *(x.detach() for x in inputs)).grad_fn]

        def on_gradient(g: Tensor) -> None:
            if kept and not self.suspensions and not _inside_transform() and self._accumulates(layer):
                self._record(forward, layer, kept.pop(), g)

        output.register_hook(on_gradient)

    # ---- backward

    def _accumulates(self, layer: Layer) -> bool:
        """Whether this backward reaches ``.grad`` of the layer's parameters (of any of the model's, if frozen)."""
        try:
            for parameter in layer.parameters.values():
                if parameter.requires_grad:
                    return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
            return any(
                torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
                for parameter in self.model.parameters()
                if parameter.requires_grad
            )
        except RuntimeError:  # autograd.grad captures this parameter's gradient
            return False

    def _enter(self, forward: _Forward) -> None:
        task = torch._C._current_graph_task_id()
        if self.suspensions or _inside_transform() or forward.done:
            return
        if self._open is not None and self._open[1] is not forward and self._open[0] == task:
            raise AttributionError(
                "one backward runs through two forwards of the model, so that samples cannot be told apart: call "
                "backward once per forward, or run the parts under probe.paused()."
            )
        if self._open is None or self._open[1] is not forward:
            self._open = (task, forward)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._leave(forward))  # type: ignore[attr-defined]

    def _record(self, forward: _Forward, layer: Layer, kept: Any, g: Tensor) -> None:
        if forward.done:
            raise AttributionError(
                f"layer {layer.name!r} got its gradient in a second backward through one forward, after its samples "
                "were counted without it: add the losses and call backward once."
            )
        self._enter(forward)
        try:
            inputs = kept.saved_tensors
        except RuntimeError as error:
            raise AttributionError(
                f"the input of layer {layer.name!r} was overwritten in place before backward: use an out-of-place "
                "operation after it, or leave the layer out with layers=."
            ) from error
        if layer.name in forward.received:
            raise AttributionError(
                f"layer {layer.name!r} was called again after its gradient was complete (a module used in several "
                "reentrant checkpoints): use torch.utils.checkpoint with use_reentrant=False."
            )
        forward.captured.setdefault(layer.name, []).append((inputs, g.detach()))
        if forward.calls.get(layer.name, 0) == 1:
            self._deliver(forward, layer)

    def _deliver(self, forward: _Forward, layer: Layer) -> None:
        calls = forward.captured.pop(layer.name)
        for inputs, g in calls:
            for tensor in (*inputs, g):  # hot path: a comparison a tensor
                if tensor.dim() == 0 or tensor.shape[0] != forward.num_samples:
                    raise AttributionError(
                        f"layer {layer.name!r} saw a tensor of shape {tuple(tensor.shape)} in a batch of "
                        f"{forward.num_samples} samples: its dimension 0 does not hold the samples. Leave the layer "
                        "out with layers=, or measure it with a one-shot call."
                    )
        device = calls[0][1].device.type
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):  # backward inside either context
            with torch.no_grad(), torch.autocast(device, enabled=False):
                self.receive(layer, calls, forward.num_samples)
        else:
            self.receive(layer, calls, forward.num_samples)
        forward.received.add(layer.name)

    def _leave(self, forward: _Forward) -> None:
        if self._open is not None and self._open[1] is forward:
            self._open = None
        if self.suspensions or forward.done:
            return
        for name in list(forward.captured):
            self._deliver(forward, self.layers[name])
        if forward.received:
            forward.done = True
            self.finish(forward.num_samples, forward.received)


class CaptureHook:
    """A forward hook of a capture; copies and pickles of the model get one that does nothing."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __reduce__(self) -> Any:
        return (_no_hook, ())


class _Begin(CaptureHook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.capture.begin(args, kwargs)


class _End(CaptureHook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.capture.end(output)


class _Called(CaptureHook):
    def __init__(self, capture: Capture, layer: Layer) -> None:
        super().__init__(capture)
        self.layer = layer

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.capture.suspensions:
            plain = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
            self.capture.called(self.layer, args if plain else tuple(tensors_in((args, kwargs))), output)


def _ignore(*_: Any) -> None:
    """What a copied model's hook does."""


def _no_hook() -> Callable[..., None]:
    return _ignore


def _inside_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Every capture attached to the model, whoever owns it, records nothing inside."""
    captures = {
        id(hook.capture): hook.capture
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if isinstance(hook, CaptureHook)
    }
    for capture in captures.values():
        capture.suspensions += 1
    try:
        yield
    finally:
        for capture in captures.values():
            capture.suspensions -= 1
