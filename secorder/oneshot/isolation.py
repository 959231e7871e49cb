"""The user's model, isolated for passes of our own: everything it owns is put back, also after an exception.

Inside :func:`isolate`, the parameters that are looked at are replaced by leaves of our own that share their memory (so
that frozen layers work, no ``.grad`` is touched and no hook on a parameter fires), buffers by copies, the random state
is forked, gradients are enabled, compiled parts run as they were written, reentrant checkpoints as plain calls,
attention under the math kernel (the fused ones have no double backward), and no attached probe records anything. What
the model and the loss keep in Python objects (counters, caches, metrics, generators), and what a forward makes of
parameters, is put back before each run, and at the end. It stays so through all backward work, since checkpointed parts
of a model run again there.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._torch.autocast import AutocastState, autocast, autocast_state
from .._torch.composite_norms import NORMS, Composite
from .._torch.engine import has_gradient_hooks
from .._torch.modules import (
    Place,
    buffer_places,
    forward_hooks,
    gradient_hooks_removed,
    holding,
    hooks_on_all_modules,
    is_scripted,
    modules_in,
    own_tensors,
    parameter_places,
    put_back,
    put_copies,
)
from .._torch.own_hooks import added_hooks_removed, is_own
from .._torch.pytree import call_model, map_tensors, once_each, tensors_in
from .._torch.random_state import RandomState, cuda_devices, get_random_state, one_at_a_time, set_random_state
from .._torch.sparse import dense_gradients
from .._torch.surroundings import assigned, function_modes
from .._torch.views import cloned
from .._torch.vjp import gradients
from ..layers.selection import Layer
from .known_losses import known_loss
from .own_settings import as_written, own_settings
from .parameter_values import ParameterValues
from .state import State
from .user_code import code_of

Result = TypeVar("Result")


class ReplacementsBypassed(Exception):
    """The loss reaches a parameter past its replacement parameter."""


#: How far from a hook on the model, or a method, its state is looked for: itself, what it holds, containers in that.
#: A trainer that it knows is no state of a forward.
LEVELS_OF_CODE = 3

#: The same of a model's arguments ``(args, kwargs)``: these, what containers and objects among them hold, and so on.
LEVELS_OF_ARGUMENTS = 6

#: Models of which it was found out that replacement parameters do not reach all that uses the parameters.
_BYPASSING: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclass(eq=False)
class IsolatedModel:
    """An isolated model: runs it again and again from one and the same state."""

    model: nn.Module
    _replacements: dict[int, Tensor]
    _originals: Sequence[nn.Parameter]
    _restart: Callable[[RandomState | None], None]
    _ambient: AutocastState
    _cuda: Sequence[int] = ()
    _loss_state: State | None = None
    _take_loss_state: Callable[[State | None], State] | None = None
    _values: ParameterValues | None = None
    #: whether it is a chain of PyTorch's own modules that is a function of parameters, buffers and input alone
    pure: bool = False
    _after: RandomState | None = None
    _after_forward: State | None = None  # hooks of the model may write what the loss reads
    _loss_writes: bool = False

    def replacement(self, parameter: nn.Parameter) -> Tensor:
        """The replacement of a parameter of a selected layer: a leaf of our own."""
        return self._replacements[id(parameter)]

    def replacements(self, layer: Layer) -> list[Tensor]:
        """The replacement parameters of a layer's parameters, in its order."""
        return [self.replacement(p) for p in layer.parameters.values()]

    def forward(self, inputs: Any) -> Any:
        """The model's output, from the same random state and buffers at every call."""
        return self.run(lambda copied: call_model(self.model, copied), inputs)

    def forward_in_full_precision(self, inputs: Any) -> Any:
        """:meth:`forward` without autocast, for what is told by small differences."""
        return self.run(lambda copied: call_model(self.model, copied), inputs, ambient={})

    def run(
        self,
        forward: Callable[[Any], Any],
        arguments: Any,
        random_state: RandomState | None = None,
        ambient: AutocastState | None = None,
    ) -> Any:
        """``forward(arguments)`` from the same (or the given) state, on copies of the tensors, which may be changed."""
        if self.pure and not any(t.is_inference() for t in tensors_in(arguments)):
            with autocast(self._ambient if ambient is None else ambient):
                return forward(arguments)
        self._restart(random_state)
        far = LEVELS_OF_ARGUMENTS
        given = State([arguments], tensors_in(arguments), levels=far, objects=far)  # a random generator, a state
        try:
            settings = autocast(self._ambient if ambient is None else ambient)
            with settings, added_hooks_removed(modules_in(self.model)):
                result = forward(map_tensors(once_each(cloned), arguments))
        finally:
            given.restore()
        if self._values is not None:
            self._values.ran()
        if self._take_loss_state is not None:
            self._after_forward = self._take_loss_state(self._loss_state)
            self._after = get_random_state(self._cuda)
        return result

    @contextmanager
    def loss_once_more(self, seed: int | None = None) -> Iterator[None]:
        """Inside, the loss runs from the state in which it ran at first, or with random numbers of another seed."""
        self.loss_writes()
        state = get_random_state(self._cuda)
        try:
            if seed is not None:
                torch.manual_seed(seed)
            elif self._after is not None:
                set_random_state(self._after, self._cuda)
            yield
        finally:
            set_random_state(state, self._cuda)

    def loss_writes(self) -> bool:
        """Whether the loss has changed anything that it holds, as far as it ran; that is put back."""
        if self._after_forward is not None:
            self._loss_writes |= self._after_forward.restore()
        return self._loss_writes

    @contextmanager
    def loss_holds(self, tensors: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside, the loss holds other tensors, given by ``id``, wherever it held the batch's own (a closure, say)."""
        if self._loss_state is None:
            yield
            return
        with self._loss_state.exchanged(tensors):
            yield

    def require_replacements(self, result: Any) -> None:
        """Raise :class:`ReplacementsBypassed` if tensors of the result depend on a parameter that was replaced."""
        ends = [] if self.pure else [t for t in tensors_in(result) if t.requires_grad]
        if ends and self._originals:
            reached = gradients(ends, self._originals, [torch.ones_like(t) for t in ends])
            if any(g is not None for g in reached):
                raise ReplacementsBypassed


def run_isolated(work: Callable[[bool], Result], model: nn.Module | None = None) -> Result:
    """``work(direct)`` with replacement parameters and, where they turn out to be bypassed, again directly.

    Of a model that is named, this is found out once.
    """
    if model is None or model not in _BYPASSING:
        try:
            return work(False)
        except ReplacementsBypassed:
            if model is not None:
                _BYPASSING.add(model)
    return work(True)


@contextmanager
def isolate(
    model: nn.Module,
    loss_fn: Any,
    layers: Sequence[Layer],
    *,
    create_graph: bool = False,
    direct: bool = False,
    pure: bool = False,
) -> Iterator[IsolatedModel]:
    """Isolate a model and its loss for passes of our own; the layers get replacement parameters.

    With ``create_graph`` trainable parameters stay in their places, so that results can be differentiated by them;
    ``direct``, all of them. Where model and loss are ``pure``, nothing is put back: they change nothing, draw nothing
    and hold parameters and buffers alone. Other threads wait for their turn.
    """
    with (
        one_at_a_time(),
        (
            _isolated_function(model, layers, create_graph=create_graph)
            if pure
            else _isolated(model, loss_fn, layers, create_graph=create_graph, direct=direct)
        ) as isolated,
    ):
        yield isolated


@contextmanager
def _isolated(
    model: nn.Module, loss_fn: Any, layers: Sequence[Layer], *, create_graph: bool, direct: bool
) -> Iterator[IsolatedModel]:
    """:func:`isolate` of what may change itself, draw, and hold anything."""
    loss_fn = getattr(loss_fn, "__wrapped__", loss_fn)
    whole = modules_in(model)
    modules = [m for m in whole if not is_scripted(m)]
    everything = {id(m): m for m in (*modules, *(loss_fn.modules() if isinstance(loss_fn, nn.Module) else ()))}
    parameters = {id(p): p for layer in layers for p in layer.parameters.values()}
    themselves = {key for key, p in parameters.items() if direct or (create_graph and p.requires_grad)}
    held = [t for m in whole for t in own_tensors(m) if isinstance(t, nn.Parameter)]
    with ExitStack() as stack:
        ambient, cuda = autocast_state(), cuda_devices(model)
        start = get_random_state(cuda)
        stack.enter_context(own_settings(model, training=loss_fn is None))
        stack.callback(set_random_state, start, cuda)
        stack.enter_context(as_written(model, training=loss_fn is None))
        if create_graph:
            stack.enter_context(Composite(NORMS))
        if loss_fn is not None:  # else in training, where another thread's backward may be accumulating
            stack.enter_context(gradients_put_aside(held))
        stack.enter_context(gradient_hooks_removed(parameters.values()))
        stack.enter_context(assigned([p for p in parameters.values() if not p.requires_grad], requires_grad=True))
        replacements: dict[int, Tensor] = {
            key: p if key in themselves else _as_leaf(p) for key, p in parameters.items()
        }
        copied = [p for p in held if p.is_inference() and id(p) not in replacements]
        usable = replacements | {id(p): p.detach().clone() for p in copied}
        places = [place for m in everything.values() for place in parameter_places(m)]
        stack.enter_context(holding([(x, usable[id(x.value)]) for x in places if id(x.value) in usable]))
        buffers = [place for m in everything.values() for place in buffer_places(m)]
        stack.callback(put_back, buffers)
        stack.enter_context(dense_gradients(everything.values()))
        originals = [p for key, p in parameters.items() if key not in themselves]
        stack.enter_context(holding(_copies_of_tables(everything.values())))
        tensors = [*(t for m in whole for t in own_tensors(m)), *replacements.values()]
        own, of_code = State(modules, tensors), _state_of_code(modules, tensors)
        stack.callback(_restore_modes, [(m, m.training) for m in modules])
        simple = loss_fn is None or known_loss(loss_fn)
        take_loss_state = None if simple else partial(State, [loss_fn], [*modules, *tensors])
        loss_state = None if take_loss_state is None else take_loss_state(None)
        values = ParameterValues(model, replacements.values(), anew=loss_fn is None)
        restore = stack.enter_context(_restored([own, of_code, loss_state, values]))

        def restart(random_state: RandomState | None) -> None:
            if restore() or random_state is not None:
                set_random_state(random_state or start, cuda)
            put_copies(buffers)

        of_loss = loss_state, take_loss_state
        yield IsolatedModel(model, replacements, originals, restart, ambient, cuda, *of_loss, values)


@contextmanager
def _isolated_function(model: nn.Module, layers: Sequence[Layer], *, create_graph: bool) -> Iterator[IsolatedModel]:
    """:func:`isolate` of what is pure: parameters that are trained, and that nothing hangs on, stay in their places."""
    parameters = {id(p): p for layer in layers for p in layer.parameters.values()}
    replaced = {
        key: _as_leaf(p)
        for key, p in parameters.items()
        if not p.requires_grad or (has_gradient_hooks(p) and not create_graph)
    }
    with ExitStack() as stack:
        ambient = autocast_state()
        stack.enter_context(own_settings(model, training=False))
        if create_graph:
            stack.enter_context(Composite(NORMS))
            stack.enter_context(gradient_hooks_removed(parameters.values()))
        if replaced:
            places = [place for m in modules_in(model) for place in parameter_places(m)]
            stack.enter_context(holding([(x, replaced[id(x.value)]) for x in places if id(x.value) in replaced]))
        yield IsolatedModel(model, parameters | replaced, [], lambda _: None, ambient, pure=True)


@contextmanager
def _restored(states: Sequence[State | ParameterValues | None]) -> Iterator[Callable[[], bool]]:
    """States that are restored at the end, and by what is yielded; not at its first call, before which nothing ran.

    It returns whether anything had.
    """
    taken = [state for state in states if state is not None]
    ran = False

    def restore() -> bool:
        nonlocal ran
        ran, before = True, ran
        for state in taken if before else ():
            state.restore()
        return before

    with ExitStack() as stack:
        for state in taken:
            stack.callback(state.restore)
        yield restore


def _state_of_code(modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> State | None:
    """What the user's hooks on modules, their own methods, and function modes that are set keep outside of modules."""
    everywhere = hooks_on_all_modules()
    # Also of tools that are PyTorch's own, such as counters of operations by module.
    tools = [getattr(hook.__self__, "__dict__", ()) for hook in everywhere if isinstance(hook, MethodType)]
    hooks = [hook for m in modules for hook in forward_hooks(m)]
    hooks = [hook for hook in (*hooks, *everywhere) if not is_own(hook)]
    modes = [x for mode in function_modes() for x in (mode, type(mode).__torch_function__)]
    roots = [*hooks, *tools, *modes, *code_of(modules)]
    return State(roots, [*modules, *tensors], levels=LEVELS_OF_CODE) if roots else None


def _as_leaf(parameter: Tensor) -> Tensor:
    """A leaf of the same memory; of an inference tensor, which autograd does not take, a copy.

    A parameter, which is what models that ask for one by ``get_parameter`` expect.
    """
    detached = parameter.detach()
    return parameter_like(parameter, detached.clone() if parameter.is_inference() else detached)


def parameter_like(parameter: Tensor, value: Tensor, *, requires_grad: bool = True) -> nn.Parameter:
    """A parameter of another value, with what was written on the first (a scale, a counter) for the model to read."""
    found = nn.Parameter(value, requires_grad=requires_grad)
    vars(found).update(vars(parameter))
    return found


@contextmanager
def gradients_put_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """What a backward of the model's own accumulates inside is forgotten."""
    kept = [(p, p.grad) for p in parameters]
    try:
        for p, grad in kept:
            if grad is not None:
                p.grad = None
        yield
    finally:
        for p, grad in kept:
            if p.grad is not grad:
                p.grad = grad


def _restore_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training is not training:
            module.training = training


def _copies_of_tables(modules: Iterable[nn.Module]) -> list[tuple[Place, Tensor]]:
    """Embeddings with ``max_norm`` overwrite their table in a forward: they get a copy to do it on."""
    return [
        (place, parameter_like(place.value, place.value.detach().clone(), requires_grad=False))
        for m in modules
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
        for place in parameter_places(m)
    ]
