"""The user's model on loan for passes of our own: everything it owns is put back, also after an exception.

Inside :func:`borrow`, the parameters that are looked at are stood in for by leaves of our own that share their memory
(so that frozen layers work, no ``.grad`` is touched and no hook on a parameter fires), buffers by copies, the random
state is forked, gradients are enabled, attention runs under the math kernel (the fused ones have no double backward),
and no attached probe records anything. It stays so through all backward work, since checkpointed parts of a model run
again there.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._torch.autocast import AutocastState, autocast, autocast_state, no_autocast
from ._torch.engine import in_backward
from ._torch.modules import Place, buffer_places, gradient_hooks_removed, parameter_places
from ._torch.pytree import call_model, map_tensors, tensors_in
from ._torch.random_state import RandomState, cuda_devices, get_random_state, set_random_state
from ._torch.transforms import inside_transform
from ._torch.versions import version
from ._torch.vjp import gradients
from .capture import suspended
from .errors import InvalidArgumentError, InvalidTypeError, NonFiniteError
from .layers import Layer, select_layers

Result = TypeVar("Result")

__all__ = [
    "Loan",
    "RandomState",
    "Recording",
    "borrow",
    "check_loss",
    "cuda_devices",
    "get_random_state",
    "losses",
    "on_loan",
    "recorded",
    "require_dependence",
]


class StandInsBypassed(Exception):
    """The loss reaches a parameter past its stand-in."""


class Loan:
    """A borrowed model: runs it again and again from one and the same state."""

    def __init__(
        self,
        model: nn.Module,
        stand_ins: dict[int, Tensor],
        originals: Sequence[nn.Parameter],
        restart: Callable[[RandomState | None], None],
        ambient: AutocastState,
    ) -> None:
        self.model = model
        self._stand_ins = stand_ins
        self._originals = originals
        self._restart = restart
        self._ambient = ambient

    def stand_in(self, parameter: nn.Parameter) -> Tensor:
        """The leaf that stands in for a parameter of a selected layer."""
        return self._stand_ins[id(parameter)]

    def stand_ins(self, layer: Layer) -> list[Tensor]:
        """The stand-ins of a layer's parameters, in its order."""
        return [self.stand_in(p) for p in layer.parameters.values()]

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

    def require_stand_ins(self, result: Any) -> None:
        """Raise :class:`StandInsBypassed` if tensors of the result depend on a parameter that has a stand-in."""
        ends = [t for t in tensors_in(result) if t.requires_grad]
        if ends and self._originals:
            reached = gradients(ends, self._originals, [torch.ones_like(t) for t in ends])
            if any(g is not None for g in reached):
                raise StandInsBypassed


def on_loan(work: Callable[[bool], Result]) -> Result:
    """``work(direct)`` with stand-ins and, where they turn out to be bypassed, again on a direct loan."""
    try:
        return work(False)
    except StandInsBypassed:
        return work(True)


@contextmanager
def borrow(
    model: nn.Module,
    loss_fn: Any,
    layers: Sequence[Layer],
    *,
    create_graph: bool = False,
    direct: bool = False,
) -> Iterator[Loan]:
    """Borrow a model and its loss for passes of our own.

    Args:
        model: the model.
        loss_fn: the loss; where it is a module, its buffers are protected too.
        layers: the layers whose parameters get stand-ins.
        create_graph: trainable parameters are their own stand-ins, so that results can be differentiated by them.
        direct: let the parameters be their own stand-ins.
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
        stand_ins: dict[int, Tensor] = {
            key: p if key in themselves else p.detach().requires_grad_(True) for key, p in parameters.items()
        }
        # What a forward stores on its modules (old-style weight_norm keeps its weight so) is put back, shallowly.
        stack.callback(_restore_attributes, [(m, dict(vars(m))) for m in modules])
        stack.enter_context(_parameters_swapped(modules, stand_ins))
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
        yield Loan(model, stand_ins, originals, restart, ambient)


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
def _parameters_swapped(modules: Iterable[nn.Module], stand_ins: Mapping[int, Tensor]) -> Iterator[None]:
    """In every module that holds one of the parameters, under whatever name, its stand-in takes the place."""
    places = [place for m in modules for place in parameter_places(m) if id(place.value) in stand_ins]
    try:
        for place in places:
            place.put(stand_ins[id(place.value)])
        yield
    finally:
        _restore(places)


def _restore_attributes(attributes: Sequence[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, saved in attributes:
        for name in [name for name in vars(module) if name not in saved]:
            del vars(module)[name]
        vars(module).update(saved)


def _restore(places: Sequence[Place]) -> None:
    for place in places:
        place.put(place.value)


# --------------------------------------------------------------------------------------------------------------------
# Recording the calls of layers


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
def recorded(loan: Loan, layers: Sequence[Layer], *, own_parameters: bool) -> Iterator[Recording]:
    """Record the calls of ``layers`` in the forwards run inside.

    A zero leaf ε is added to each output: differentiating with respect to it is differentiating with respect to the
    output, whatever in-place operation overwrites it later.

    Args:
        loan: the borrowed model.
        layers: the layers to record.
        own_parameters: whether a layer's forward uses its parameters' stand-ins. Where not, it uses detached ones,
            and a stand-in has a gradient only by uses outside of its layer's forward: that is how these are found.
    """
    recording = Recording()
    handles = []
    taps = [_Tap(recording, layer, [] if own_parameters else _places(loan, layer)) for layer in layers]
    try:
        for tap in taps:
            if not own_parameters:
                handles.append(tap.layer.unit.register_forward_pre_hook(tap.before, prepend=True))
            handles.append(tap.layer.unit.register_forward_hook(tap.after, prepend=True, with_kwargs=True))
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
        """Detached parameters take the place of the stand-ins."""
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


def _places(loan: Loan, layer: Layer) -> list[Place]:
    """Where the modules of a layer's unit keep the stand-ins of its parameters."""
    wanted = {id(s) for s in loan.stand_ins(layer)}
    return [p for module in layer.unit.modules() for p in parameter_places(module) if id(p.value) in wanted]


# --------------------------------------------------------------------------------------------------------------------
# The loss


def check_loss(loss: Any, loan: Loan, inputs: Any) -> Tensor:
    """The loss, if curvature can be measured on it.

    Raises:
        InvalidTypeError: it is not a tensor.
        InvalidArgumentError: it is not a scalar.
        NonFiniteError: it is nan or infinite; names the layer whose output was the first to be so.
    """
    if not isinstance(loss, Tensor):
        raise InvalidTypeError(f"loss_fn must return a scalar tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise InvalidArgumentError(
            f"loss_fn must return a scalar, got shape {tuple(loss.shape)}: reduce it, for example with .mean()."
        )
    if not bool(torch.isfinite(loss.detach())):
        where = _first_non_finite(loan, inputs)
        raise NonFiniteError(f"the loss is {loss.item()}{where}: there is no curvature to measure here.")
    return loss.reshape(())


def losses(model: nn.Module, loss_fn: Any, batches: Iterable[tuple[Any, Any]]) -> Tensor:
    """The loss on each of several batches, from the same state, without gradients; shape ``(len(batches),)``."""
    with borrow(model, loss_fn, []) as loan, torch.no_grad():
        return torch.stack([check_loss(loss_fn(loan.forward(x), t), loan, x) for x, t in batches])


def _first_non_finite(loan: Loan, inputs: Any) -> str:
    """Where a non-finite value began, in words (one more forward, without gradients)."""
    if not all(bool(torch.isfinite(t).all()) for t in tensors_in(inputs) if t.is_floating_point()):
        return " and the inputs hold non-finite values already"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(
                bool(torch.isfinite(t).all()) for t in tensors_in(output) if t.is_floating_point()
            ):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in loan.model.named_modules() if name]
    try:
        with torch.no_grad():
            loan.forward(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return f", first in the output of layer {found[0]!r}" if found else ""


def require_dependence(model: nn.Module, loss_fn: Any, inputs: Any, targets: Any) -> None:
    """Raise unless the loss depends on some parameter of the model, selected or not.

    Raises:
        InvalidArgumentError: it depends on none.
    """
    parameters = list(model.parameters())
    everything = select_layers(model, "all", unchecked=True)
    with borrow(model, loss_fn, everything, direct=True) as loan:
        loss = loss_fn(loan.forward(inputs), targets)
        stand_ins = [loan.stand_in(p) for p in parameters]
        if loss.requires_grad and any(g is not None for g in gradients(loss.sum(), stand_ins)):
            return
    raise InvalidArgumentError(
        "the loss does not depend on the model's parameters: loss_fn must be computed from the model's output "
        "without .detach(), .item() or torch.no_grad()."
    )
