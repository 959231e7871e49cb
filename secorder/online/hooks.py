"""The hooks on a live model: they fill a record of each forward that is recorded, and of its backward.

The model itself has two hooks for good; its layers have theirs only while a recorded forward runs, and while the
backward of one runs in which layers are computed again (activation checkpoints). So evaluation, steps that are not
recorded, ``torch.export``, ``torch.jit.trace`` and copies never meet a hook of a layer.

What they rely on, and why:

- A prehook on the autograd node of a layer's output gives dL/dz after every hook on the output has changed it, and
  survives in-place operations after the layer.
- Inputs are kept as autograd keeps its saved tensors, so that activation checkpointing may free and recompute them, and
  a graph that is dropped drops them too.
- Only a backward that accumulates into the parameters counts: ``torch.autograd.grad`` on the same graph does not.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from .._torch.beginning import wait_no_more
from .._torch.compile import (
    EagerSection,
    being_compiled,
    hooks_prevent_compiling,
    is_traced,
    leave_graph,
    may_break_graph,
    uncompiled,
)
from .._torch.engine import NO_BACKWARD, current_backward, in_backward
from .._torch.graph import nodes_made
from .._torch.modules import is_running, kept_out_of_copies, threads_running
from .._torch.own_hooks import Aside, FirstHooks, OwnHook, computes_by_its_hooks
from .._torch.pytree import tensors_in
from .._torch.saved_tensors import section_computed_again
from .._torch.surroundings import inside_transform
from ..layers.selection import Layer
from .attributions import Attributions
from .backward import enters, enters_unrecorded, let_go
from .capture import keeps_as_many, layer_called, module_called, module_starts
from .changed_gradients import Factors, WatchedHooks
from .fisher import OnlineFisher
from .opening import open_record, settle
from .record import ForwardRecord


class Attachment:
    """The hooks of one probe on its model: one forward in ``every`` is recorded, of train and of eval mode."""

    def __init__(self, model: nn.Module, fisher: OnlineFisher, attributions: Attributions, every: int) -> None:
        self.model = model
        self.fisher = fisher
        self.name = fisher.name  # read by hooks that are traced
        self.attributions = attributions
        self.every = every
        self.suspensions = 0  # by passes of the library's own
        self.pauses = 0  # by the user
        #: Forwards counted towards ``every``, in train and in eval mode.
        self.counts = {True: 0, False: 0}
        self.running: dict[int, ForwardRecord] = {}  # by thread
        self._again: dict[int, ForwardRecord] = {}  # by thread, what a checkpoint around the model computes again
        self._sections: WeakKeyDictionary[Any, ref[ForwardRecord]] = WeakKeyDictionary()  # of checkpoints
        self._handles: list[Any] = []
        self.aside: Aside | None = None
        self.factors: Factors = {}
        self._waiting: set[int] = set()  # threads whose forward has not begun
        self._patience = 1.0  # seconds that a look waits for other threads' passes; halved by each wait in vain
        self._beginning = threading.RLock()
        self.verifying: int | None = None  # the thread in which the model is verified
        self.watched: ref[ForwardRecord] | None = None  # the latest forward whose loss is to be looked at
        self.latest: ref[ForwardRecord] | None = None  # the latest forward whose loss may be of another kind
        self.forwards = 0  # since the latest backward
        self.wanted = False  # whether the next forward's loss is to be looked at

    def attach(self) -> None:
        """Register the hooks of the model."""
        begin, end = _Begin(self), _End(self)
        self._handles = [
            self.model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(end, always_call=True, with_kwargs=True),
            kept_out_of_copies(self.model, OwnHook),
        ]

    def detach(self) -> bool:
        """Remove every hook; backward passes of forwards that were recorded before are ignored from now on.

        False where the user's code asks for it in a pass of ours, as it will once more in the user's own.
        """
        if self.verifying == threading.get_ident():
            return False
        self.pauses += 1
        if self.aside is not None:
            self.aside.remove()
        while self._handles:
            self._handles.pop().remove()
        for thread in list(self.running):
            self._drop(thread)
        wait_no_more(self)
        let_go(self.fisher, list(self.fisher.backwards.values()))
        return True

    def _drop(self, thread: int) -> ForwardRecord:
        """The forward that runs in a thread has ended: its hooks go, and what was compiled runs compiled again."""
        record = self.running.pop(thread)
        record.unhook()
        if record.eager is not None:
            record.eager.end()
            record.eager = None
        return record

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Inside, no other thread begins a forward; whether none runs a pass, so that the model can be looked at.

        A look puts other tensors in the places of parameters and buffers, which nobody else is to compute with, and
        takes the hooks off parameters. So what runs is waited for, unless it does not end, as where it waits for this
        thread itself.
        """
        with self._beginning:
            self.verifying = threading.get_ident()
            try:
                yield self.fisher.ranks is not None or self._others_end(self.verifying)
            finally:
                self.verifying = None

    def _others_end(self, own: int) -> bool:
        """Whether the passes that other threads run have ended, or do soon."""
        until = time.monotonic() + self._patience
        while self._others(own):
            if time.monotonic() > until:
                self._patience /= 2
                return False
            time.sleep(0.001)
        return True

    def _others(self, own: int) -> set[int]:
        """The other threads that run a forward of the model, or a backward through one."""
        backwards = {backward.thread for backward in list(self.fisher.backwards.values())} - {own}
        return threads_running(self.model) - self._waiting | backwards

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], eager: EagerSection) -> bool:
        """The model's forward starts; whether it is recorded, so that the section is its own."""
        thread = threading.get_ident()
        if (around := self.running.get(thread)) is not None:
            around.nested = True
        if in_backward():  # perhaps in a thread of the engine's, for which the look at the model waits
            return self._begin(args, kwargs, eager, within=True)
        if not self._beginning.acquire(blocking=False):
            self._waiting.add(thread)
            try:
                self._beginning.acquire()
            finally:
                self._waiting.discard(thread)
        try:
            return self._begin(args, kwargs, eager, within=False)
        finally:
            self._beginning.release()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], eager: EagerSection, *, within: bool) -> bool:
        """The same, one thread at a time, or ``within`` a backward."""
        saw = self.fisher.troubles.saw
        if self.suspensions:
            return False
        if self.pauses:
            saw("paused")
            return False
        if inside_transform() or is_traced():
            saw("transformed" if inside_transform() else "traced")
            return False
        if within and (self._computed_again() or self.fisher.backwards.here()):
            return False  # a checkpoint computes the whole model again; the layers' hooks are back by themselves
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            saw("no grad")
            return False
        thread = threading.get_ident()
        stale = self.running.get(thread)
        if stale is not None:
            if is_running(self.model):
                return False  # a model that calls itself: its inner calls are a part of the outer one
            self._drop(thread)  # an interrupt kept the end of an earlier forward from being told
        if self.fisher.backwards and not within:  # those of this thread that have not ended were broken off
            let_go(self.fisher, self.fisher.backwards.here())
        count = self.counts[self.model.training]
        self.counts[self.model.training] = count + 1
        if count % self.every:
            return False
        if not differentiable(self.fisher.layers, self.model, (args, kwargs)):
            saw("no gradient")
            return False
        if eager.within_compiled_code():
            if hooks_prevent_compiling(self.model):  # so there is no whole graph, nor a PyTorch that insists on one
                self.fisher.troubles.warn(
                    f"PyTorch {torch.__version__} compiles nothing of a {type(self.model).__name__} with a probe but "
                    "modules of your own in it: the rest runs as it was written. Attach to what torch.compile "
                    "returned, or make it a part of your own module."
                )
            elif eager.whole_graph_wanted():
                saw("compiled")
                return False
        eager.run_compiled_code_eagerly()  # also where the model is verified
        record = open_record(self, args, kwargs)
        if record is None:
            return False
        try:
            self.register(record)
        except BaseException:
            record.unhook()
            raise
        self.running[thread] = record
        record.eager = eager
        record.began = nodes_made()
        saw("forward")
        return True

    def end(self, args: Any, kwargs: Any, output: Any, sections: list[EagerSection]) -> None:
        """The model's forward ended, perhaps by an exception (then without an output).

        Its section is added to those that are ended when all here is done.
        """
        thread = threading.get_ident()
        record = self.running.get(thread)
        if (record is None or record.nested) and is_running(self.model):
            return
        if record is None:
            if in_backward():
                self._leave_computed_again()
            else:
                self._watch_unrecorded(output)
            return
        if record.eager is not None:
            sections.append(record.eager)
            record.eager = None
        self._drop(thread)
        if output is None or self.pauses:
            record.closed, record.unreturned = True, output is None
            return
        if (root := record.root) is not None:
            if root.rule is None and record.start is not None:
                record.layers[root.name].starts += (record.start,)
            called = layer_called if root.rule else module_called
            _LayerHook(called, self, record, root)(self.model, args, kwargs, output)
        settle(self, record, (args, kwargs), output)
        record.ended = nodes_made()
        for section in record.sections or ():
            self._sections[section] = ref(record)
        for tensor in tensors_in(output):
            if tensor.requires_grad and tensor.grad_fn is not None:
                # Opens the backward before any layer is reached: under reentrant checkpoints, layers run inside of it.
                returned = bool(self.fisher.returned) and not tensor.dim() and tensor.is_floating_point()
                tensor.register_hook(partial(enters, self, record, returned))

    def _computed_again(self) -> bool:
        """Whether a checkpoint around the model computes a forward again: if it was recorded, its layers are hooked.

        Where the loss is inside of it too, that is before any gradient has come to the forward.
        """
        section = section_computed_again()
        record = None if section is None else self._sections.get(section, lambda: None)()
        if record is not None and not record.handles:  # also where it is closed: as many tensors are to be saved again
            self.register(record)
            self._again[threading.get_ident()] = record
        return section is not None

    def _leave_computed_again(self) -> None:
        """The forward that is computed again has ended: hooks go, unless the backward that runs has use for them."""
        record = self._again.pop(threading.get_ident(), None)
        if record is not None and (record.backward is None or record.backward.ended):
            record.unhook()

    def _watch_unrecorded(self, output: Any) -> None:
        """A forward that is not one of each ``every``: what it and a recorded one bring cannot be told apart."""
        if self.every > 1 and not self.suspensions and not inside_transform() and not is_traced():
            for tensor in tensors_in(output):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(partial(enters_unrecorded, self))

    def register(self, record: ForwardRecord) -> None:
        """Put the hooks of a record on the layers; those of the model itself are called by the hooks that it has."""
        found, model = record.attribution, self.model
        hooks: list[_LayerHook] = []
        for layer in found.by_rule:
            if layer.enclosing is model:
                record.root = record.root or layer
            else:
                hooks.append(_LayerHook(layer_called, self, record, layer))
        for layer in found.by_module:
            if layer.enclosing is model:
                record.root = record.root or layer
            else:
                starts = _LayerHook(module_starts, self, record, layer)
                record.handles.append(layer.enclosing.register_forward_pre_hook(starts, prepend=True, with_kwargs=True))
                hooks.append(_LayerHook(module_called, self, record, layer))
        if hooks:
            record.handles.append(first := FirstHooks())
            first.put([(hook.layer.enclosing, hook) for hook in hooks])
        if record.verified:
            record.handles.append(WatchedHooks(self.fisher, self.factors, self.model.modules()))


def differentiable(layers: Sequence[Layer], model: nn.Module, arguments: Any) -> bool:
    """Whether a backward may follow a forward; layers that are measured tell it most often, and the soonest."""
    for layer in layers:
        for parameter in layer.parameters.values():
            if parameter.requires_grad:
                return True
    return any(t.requires_grad for t in chain(model.parameters(), tensors_in(arguments)))


class _Begin(OwnHook):
    @uncompiled
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if being_compiled():
            if may_break_graph(self.owner.name):
                leave_graph()
            return
        eager, fisher, recorded = EagerSection(), self.owner.fisher, False
        try:
            recorded = fisher.troubles.guarded(None, fisher.by_layer, self.owner.begin, args, kwargs, eager)
        finally:
            if not recorded:  # it runs on as it is compiled, and is not computed otherwise for the hook at its end
                if computes_by_its_hooks(module) and not is_running(module):
                    self.owner.aside = Aside(module)
                eager.end()


class _End(OwnHook):
    @uncompiled
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if being_compiled():
            if may_break_graph(self.owner.name):
                leave_graph()
            return
        sections: list[EagerSection] = []  # of a forward that is recorded the forward's own
        if threading.get_ident() not in self.owner.running:
            sections.append(EagerSection())
        fisher = self.owner.fisher
        try:
            fisher.troubles.guarded(None, fisher.by_layer, self.owner.end, args, kwargs, output, sections)
        finally:
            for section in sections:
                section.end()


class _LayerHook(OwnHook):
    """A hook on a layer's module, which does its work with the record that it fills."""

    def __init__(self, work: Callable[..., None], owner: Attachment, record: ForwardRecord, layer: Layer) -> None:
        self.work, self.owner, self.record, self.layer = work, owner, record, layer

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        owner, record, work = self.owner, self.record, self.work
        if owner.suspensions or inside_transform():
            return
        if current_backward() != NO_BACKWARD:  # a checkpoint computes the layer again, perhaps another forward's
            if record.of_another():
                return
            if owner.pauses:
                work = keeps_as_many
        elif owner.pauses or threading.get_ident() != record.thread:
            return
        owner.fisher.troubles.guarded(record, (self.layer.name,), work, owner, record, self.layer, args, kwargs, output)
