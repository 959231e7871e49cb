"""All that one forward tells of one layer, from its first call to the end of the backward.

The phases of a call, and what ends it::

    called ──► hooked ──► captured ──► received
                  │           │
                  │           └─ another call of the layer lacks its gradient: it waits for the backward's end
                  ├─ its gradient is not accumulated (torch.autograd.grad): passed
                  └─ it is not known where its samples are: troubled, or measured by running the model again, replaced
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._torch.autocast import AutocastState, autocast_state
from .._torch.modules import Place
from .._torch.pytree import tensors_in
from .._torch.random_state import RandomState, cuda_devices, get_random_state
from .._torch.versions import version
from ..layers.layout import Layout
from ..layers.rank_one import FactorNorms
from ..layers.uses import Uses
from .samples.relation import Shape

#: One use of a layer: the tensors it was called with, and the gradient on its output.
Call = tuple[tuple[Tensor, ...], Tensor]


class State(NamedTuple):
    """What a call of a module starts from.

    Attributes:
        random_state: the global one.
        autocast: what is enabled.
        buffers: those that the call overwrites, as they were.
    """

    random_state: RandomState
    autocast: AutocastState
    buffers: tuple[tuple[Place, Tensor], ...]


class Start:
    """How a module was called: its arguments, before its other hooks see them, and what the call starts from."""

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], changing: Sequence[Place] = ()
    ) -> None:
        self.arguments = (args, kwargs)
        buffers = tuple((place, place.held().detach().clone()) for place in changing)
        self.state = State(get_random_state(cuda_devices(module)), autocast_state(), buffers)
        self._versions = [version(t) for t in tensors_in(self.arguments)]

    def overwritten(self) -> bool:
        """Whether the call changed its arguments in place, so that it cannot be run again."""
        return self._versions != [version(t) for t in tensors_in(self.arguments)]


@dataclass(eq=False)
class ModuleCall:
    """One use of an enclosing module, to be run again: how it was called, and the gradients on its outputs.

    Attributes:
        arguments: positional and keyword arguments, tensors replaced by empty ones.
        state: what it started from.
        index: the call's number in the forward.
        tensors: the tensors of the arguments.
        gradients: dL/d(output tensor), None where the loss does not depend on it.
        layouts: where each output tensor's samples are.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    state: State
    index: int
    tensors: tuple[Tensor, ...] = ()
    gradients: list[Tensor | None] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class LayerRecord:
    """What a forward, and the backward through it, tell of a layer.

    Attributes:
        calls: the shapes of the outputs of each of its calls.
        hooked: the numbers of those whose gradient will come.
        recomputed: of those that were computed again in backward.
        starts: how the enclosing module's calls that are running were started.
        uses: the operations that its parameters meet the samples in, until they are hooked.
        unfollowed: whether these could not be followed in this forward.
        layouts: where the samples are in each call's outputs; decided when the forward has ended, none where unknown.
        replaced: whether the whole model runs again for it: what its own calls bring is not to be counted.
        troubled: whether it is marked, so that nothing more is done for it.
        without_gradient: whether it ran with nothing to differentiate.
        gathered: of a sharded layer, the whole parameters that FSDP2 puts into the module while it runs.
        captured: the calls whose gradient has come: number, call, sum of the gradient's elements if known.
        modules: the calls of the enclosing module whose gradient has come.
        counting: where it is measured by operations, the latest backward that is a training step of it.
        passed: the latest backward in which a gradient passed by that was not accumulated.
        received: whether its squares are added, or wait to be.
        parts: what it has brought, where it shares a parameter, until all layers that do have.
        norms: the squared norms of its per-sample gradients, or what they are products of, where they are taken.
        squares: the squared norm of their sum, where the whole gradient does not tell it.
        sizes: where it is measured by operations, by parameter that the audit looks at the square of the size of what
            its per-sample gradients are sums of.
    """

    calls: list[tuple[Shape, ...]] = field(default_factory=list)
    hooked: set[int] = field(default_factory=set)
    recomputed: set[int] = field(default_factory=set)
    starts: list[Start] = field(default_factory=list)
    uses: Uses | None = None
    unfollowed: bool = False
    layouts: Sequence[Sequence[Layout]] = ()
    replaced: bool = False
    troubled: bool = False
    without_gradient: bool = False
    gathered: dict[str, Any] | None = None
    captured: list[tuple[int, Any, Tensor | None]] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    counting: int | None = None
    passed: int | None = None
    received: bool = False
    parts: tuple[Any, Tensor | None] | None = None
    norms: Tensor | FactorNorms | None = None
    squares: Tensor | None = None
    sizes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Of what its calls have returned."""
        return sum([prod(shape) for call in self.calls for shape in call])

    @property
    def reached(self) -> bool:
        """Whether any of its gradients has come."""
        return bool(self.received or self.captured or self.modules or self.parts)
