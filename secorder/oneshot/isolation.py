"""The user's model on isolated for passes of our own: everything it owns is put back, also after an exception.

Inside :func:`isolate`, the parameters that are looked at are stood in for by leaves of our own that share their memory
(so that frozen layers work, no ``.grad`` is touched and no hook on a parameter fires), buffers by copies, the random
state is forked, gradients are enabled, attention runs under the math kernel (the fused ones have no double backward),
and no attached probe records anything. It stays so through all backward work, since checkpointed parts of a model run
again there.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch.autocast import AutocastState, autocast, autocast_state, no_autocast
from .._torch.modules import Place, buffer_places, gradient_hooks_removed, parameter_places
from .._torch.own_hooks import suspended
from .._torch.pytree import call_model, map_tensors, tensors_in
from .._torch.random_state import RandomState, cuda_devices, get_random_state, set_random_state
from .._torch.vjp import gradients
from ..layers.selection import Layer

__all__ = ["IsolatedModel", "ReplacementsBypassed", "Result", "isolate", "run_isolated"]

Result = TypeVar("Result")


class ReplacementsBypassed(Exception):
    """The loss reaches a parameter past its replacement parameter."""


class IsolatedModel:
    """A borrowed model: runs it again and again from one and the same state."""

    def __init__(
        self,
        model: nn.Module,
        replacements: dict[int, Tensor],
        originals: Sequence[nn.Parameter],
        restart: Callable[[RandomState | None], None],
        ambient: AutocastState,
    ) -> None:
        self.model = model
        self._replacements = replacements
        self._originals = originals
        self._restart = restart
        self._ambient = ambient

    def replacement(self, parameter: nn.Parameter) -> Tensor:
        """The leaf that stands in for a parameter of a selected layer."""
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
        self._restart(random_state)
        copies: dict[int, Tensor] = {}  # one tensor given twice stays one: attention asks whether query is key

        def copied(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.clone()
            return copies[id(tensor)]

        with autocast(self._ambient if ambient is None else ambient):
            return forward(map_tensors(copied, arguments))

    def require_replacements(self, result: Any) -> None:
        """Raise :class:`ReplacementsBypassed` if tensors of the result depend on a parameter that was replaced."""
        ends = [t for t in tensors_in(result) if t.requires_grad]
        if ends and self._originals:
            reached = gradients(ends, self._originals, [torch.ones_like(t) for t in ends])
            if any(g is not None for g in reached):
                raise ReplacementsBypassed


def run_isolated(work: Callable[[bool], Result]) -> Result:
    """``work(direct)`` with replacement parameters and, where they turn out to be bypassed, again directly."""
    try:
        return work(False)
    except ReplacementsBypassed:
        return work(True)


@contextmanager
def isolate(
    model: nn.Module,
    loss_fn: Any,
    layers: Sequence[Layer],
    *,
    create_graph: bool = False,
    direct: bool = False,
) -> Iterator[IsolatedModel]:
    """Isolate a model and its loss for passes of our own.

    Args:
        model: the model.
        loss_fn: the loss; where it is a module, its buffers are protected too.
        layers: the layers whose parameters get replacement parameters.
        create_graph: leave trainable parameters in their places, so that results can be differentiated by them.
        direct: leave all of them in their places.
    """
    loss_fn = getattr(loss_fn, "__wrapped__", loss_fn)
    owners = [model, loss_fn] if isinstance(loss_fn, nn.Module) else [model]
    modules = list({id(m): m for owner in owners for m in owner.modules()}.values())
    with ExitStack() as stack:
        stack.enter_context(suspended(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        ambient = autocast_state()
        stack.enter_context(no_autocast())
        cuda = cuda_devices(model)
        stack.callback(set_random_state, get_random_state(cuda), cuda)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        parameters = {id(p): p for layer in layers for p in layer.parameters.values()}
        themselves = {key for key, p in parameters.items() if direct or (create_graph and p.requires_grad)}
        stack.enter_context(_differentiable(parameters.values()))
        replacements: dict[int, Tensor] = {
            key: p if key in themselves else p.detach().requires_grad_(True) for key, p in parameters.items()
        }
        # What a forward stores on its modules (old-style weight_norm keeps its weight so) is put back, and so is what
        # it puts into their lists and dicts (losses of experts, features that hooks collect).
        stack.callback(_restore_attributes, [(m, dict(vars(m))) for m in modules])
        stack.callback(_restore_containers, _containers([list(_own_attributes(m)) for m in modules]))
        stack.enter_context(_parameters_swapped(modules, replacements))
        buffers = [place for m in modules for place in buffer_places(m)]
        stack.enter_context(_tables_copied(modules))
        stack.callback(_restore, buffers)
        start = get_random_state(cuda)

        def restart(random_state: RandomState | None) -> None:
            set_random_state(random_state or start, cuda)
            copies: dict[int, Tensor] = {}
            for place in buffers:
                buffer = place.value
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                place.put(copies[id(buffer)])

        originals = [p for key, p in parameters.items() if key not in themselves]
        yield IsolatedModel(model, replacements, originals, restart, ambient)


@contextmanager
def _differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters too require a gradient, and what hangs on the parameters for theirs does not run."""
    frozen = [p for p in parameters if not p.requires_grad]
    with gradient_hooks_removed(parameters):
        for p in frozen:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)


@contextmanager
def _tables_copied(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Embeddings with ``max_norm`` overwrite their table in a forward: they get a copy to do it on."""
    tables = [
        place
        for m in modules
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
        for place in parameter_places(m)
    ]
    try:
        for place in tables:
            place.put(nn.Parameter(place.value.detach().clone(), requires_grad=False))
        yield
    finally:
        _restore(tables)


@contextmanager
def _parameters_swapped(modules: Iterable[nn.Module], replacements: Mapping[int, Tensor]) -> Iterator[None]:
    """In every module that holds one of the parameters, under whatever name, its replacement takes the place."""
    places = [place for m in modules for place in parameter_places(m) if id(place.value) in replacements]
    try:
        for place in places:
            place.put(replacements[id(place.value)])
        yield
    finally:
        _restore(places)


def _restore_attributes(attributes: Sequence[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, saved in attributes:
        for name in [name for name in vars(module) if name not in saved]:
            del vars(module)[name]
        vars(module).update(saved)


def _own_attributes(module: nn.Module) -> Iterator[Any]:
    """What the user's code has made attributes of a module."""
    return (value for name, value in vars(module).items() if name not in _OF_MODULES)


_OF_MODULES = set(vars(nn.Module()))

#: Containers with more entries are taken to hold data, not what a forward collects: what is in their entries is left.
_LARGE = 1000


def _containers(found: Any, seen: dict[int, tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """The lists, dicts, sets and deques in a structure, each with what it holds."""
    seen = {} if seen is None else seen
    if isinstance(found, (list, dict, set, deque)) and id(found) not in seen:
        seen[id(found)] = found, copy.copy(found)
    elif not isinstance(found, tuple):
        return list(seen.values())
    if len(found) <= _LARGE:
        for part in found.values() if isinstance(found, dict) else found:
            if isinstance(part, (list, dict, set, deque, tuple)) and id(part) not in seen:
                _containers(part, seen)
    return list(seen.values())


def _restore_containers(containers: Sequence[tuple[Any, Any]]) -> None:
    for container, before in containers:
        if len(container) == len(before) and all(
            x is y for x, y in zip(_entries(container), _entries(before), strict=True)
        ):
            continue
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(before)


def _entries(container: Any) -> Iterator[Any]:
    """What a container holds, for comparison by identity."""
    return (part for pair in container.items() for part in pair) if isinstance(container, dict) else iter(container)


def _restore(places: Sequence[Place]) -> None:
    for place in places:
        place.put(place.value)
