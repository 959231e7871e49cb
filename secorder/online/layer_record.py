"""All that one forward tells of one layer, from its first call to the end of the backward.

The phases of a call, and what ends it::

    called ──► hooked ──► captured ──► received
                  │           │
                  │           └─ another call of the layer lacks its gradient: it waits for the backward's end
                  ├─ its gradient is not accumulated (torch.autograd.grad): passed
                  └─ it is not known where its samples are: troubled, or measured by running the model again, replaced
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch.autocast import AutocastState, autocast_state
from .._torch.modules import Place, is_scripted, modules_in, own_tensors
from .._torch.pytree import tensors_in
from .._torch.random_state import RandomState, cuda_devices, get_random_state, same_beside_torch
from .._torch.versions import version
from ..layers.layout import Layout
from ..layers.rank_one import FactorNorms
from ..layers.uses import Uses
from ..oneshot.state import State as PythonState
from .samples.relation import Shape

#: One use of a layer: the tensors it was called with, and the gradient on its output.
Call = tuple[tuple[Tensor, ...], Tensor]


class State(NamedTuple):
    """What a call of a module starts from."""

    random_state: RandomState  #: the global one
    autocast: AutocastState  #: what is enabled
    buffers: tuple[tuple[Place, Tensor], ...]  #: those that the call overwrites, as they were
    held: PythonState | None  #: in Python objects, such as a count of calls; None where it was not noted


def python_state(module: nn.Module) -> PythonState:
    """What a module and those in it keep in Python objects; parameters and buffers are seen to otherwise."""
    modules = modules_in(module)
    return PythonState([m for m in modules if not is_scripted(m)], [t for m in modules for t in own_tensors(m)])


@contextmanager
def as_it_started(module: nn.Module, state: State) -> Iterator[None]:
    """Inside, the module has the buffers, and keeps in Python objects, what it did when a call started."""
    now = [(place, place.held()) for place, _ in state.buffers]
    held = None if state.held is None else python_state(module)
    try:
        if state.held is not None:
            state.held.restore()
        for place, before in state.buffers:  # last: the tables of buffers are Python objects, too
            place.put(before)
        yield
    finally:
        if held is not None:
            held.restore()
        for place, value in now:
            place.put(value)


class Start:
    """How a module was called: its arguments, before its other hooks see them, and what the call starts from.

    Args:
        changing: the buffers that a call overwrites.
        held: whether the module is known to run again, so that what it keeps in Python objects is noted, too.
        draws: whether it may draw random numbers of Python's or NumPy's.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        changing: Sequence[Place],
        *,
        held: bool,
        draws: bool = True,
    ) -> None:
        self.arguments = (args, kwargs)
        buffers = tuple((place, place.held().detach().clone()) for place in changing)
        kept = python_state(module) if held else None
        random_state = get_random_state(cuda_devices(module), of_torch=not draws)
        self.state = State(random_state, autocast_state(), buffers, kept)
        self._versions = [version(t) for t in tensors_in(self.arguments)]

    def drew(self) -> bool:
        """Whether random numbers of Python's or NumPy's were drawn since, as far as their state was taken."""
        before = self.state.random_state
        return before.python is not None and not same_beside_torch(before, get_random_state(()))

    def overwritten(self) -> bool:
        """Whether the call changed its arguments in place, so that it cannot be run again."""
        return self._versions != [version(t) for t in tensors_in(self.arguments)]


@dataclass(eq=False)
class ModuleCall:
    """One use of an enclosing module, to be run again: how it was called, and the gradients on its outputs."""

    #: positional and keyword arguments, tensors replaced by empty ones
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    state: State  #: what it started from
    index: int  #: the call's number in the forward
    tensors: tuple[Tensor, ...] = ()  #: the tensors of the arguments
    #: dL/d(output tensor), None where the loss does not depend on it
    gradients: list[Tensor | None] = field(default_factory=list)
    #: where each output tensor's samples are, None for one of no samples
    layouts: list[Layout | None] = field(default_factory=list)
    #: the dtype of the fewest digits in which it computed when it ran again
    computed_in: torch.dtype | None = None


class LayerRecord:
    """What a forward, and the backward through it, tell of a layer; what only some tell is the class's until then."""

    recomputed: frozenset[int] = frozenset()  #: the numbers of calls that were computed again in backward
    starts: tuple[Start, ...] = ()  #: how the enclosing module's calls that are running were started
    uses: Uses | None = None  #: the operations that its parameters meet the samples in, until they are hooked
    unfollowed: bool = False  #: whether these could not be followed in this forward
    #: where the samples are in each call's outputs; decided when the forward has ended, none where unknown. None is
    #: for an output of the model that has none of them, beside others, where the model runs again
    layouts: Sequence[Sequence[Layout | None]] = ()
    replaced: bool = False  #: whether the whole model runs again for it: what its own calls bring is not to be counted
    troubled: bool = False  #: whether it is marked, so that nothing more is done for it
    without_gradient: bool = False  #: whether it ran with nothing to differentiate
    #: of a sharded layer, the whole parameters that FSDP2 puts into the module while it runs
    gathered: dict[str, Any] | None = None
    modules: tuple[ModuleCall, ...] = ()  #: the calls of the enclosing module whose gradient has come
    #: where it is measured by operations, the latest backward that is a training step of it
    counting: int | None = None
    passed: int | None = None  #: the latest backward in which a gradient passed by that was not accumulated
    received: bool = False  #: whether its squares are added, or wait to be
    #: what it has brought, where it shares a parameter, until all layers that do have
    parts: tuple[Any, Tensor | None] | None = None
    #: the squared norms of its per-sample gradients, or what they are products of, where they are taken
    norms: Tensor | FactorNorms | None = None
    squares: Tensor | None = None  #: the squared norm of their sum, where the whole gradient does not tell it
    #: where it is measured by operations, by parameter that the audit looks at the square of the size of what its per-
    #: sample gradients are sums of
    sizes: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self) -> None:
        self.calls: list[tuple[Shape, ...]] = []  #: the shapes of the outputs of each of its calls
        self.hooked: set[int] = set()  #: the numbers of those whose gradient will come
        #: the calls whose gradient has come: number, call, sum of the gradient's elements if known
        self.captured: list[tuple[int, Any, Tensor | None]] = []

    @property
    def elements(self) -> int:
        """Of what its calls have returned."""
        return sum([prod(shape) for call in self.calls for shape in call])

    @property
    def reached(self) -> bool:
        """Whether any of its gradients has come."""
        return bool(self.received or self.captured or self.modules or self.parts)
