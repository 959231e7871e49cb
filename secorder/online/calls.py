"""One forward of the model as its hooks saw it: the calls of layers, and what was kept of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from .._torch.autocast import AutocastState, autocast_state
from .._torch.pytree import tensors_in
from .._torch.random_state import RandomState, get_random_state
from .._torch.versions import version
from ..errors import AttributionError
from ..layers.layout import Layout
from ..layers.selection import Layer

__all__ = ["Call", "Forward", "ModuleCall", "Receiver", "Start"]

#: One use of a layer: the tensors it was called with, and the gradient on its output.
Call = tuple[tuple[Tensor, ...], Tensor]


@dataclass(eq=False)
class ModuleCall:
    """One use of a module: how it was called, and the gradients on its outputs.

    Attributes:
        arguments: positional and keyword arguments, tensors replaced by empty ones.
        random_state: the random state at the call.
        autocast: the autocast state at the call.
        index: the call's number in the forward.
        tensors: the tensors of the arguments.
        gradients: dL/d(output tensor), None where the loss does not depend on it.
        layouts: where each output tensor's samples are.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    random_state: RandomState
    autocast: AutocastState
    index: int
    tensors: tuple[Tensor, ...] = ()
    gradients: list[Tensor | None] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)


@dataclass(eq=False)
class Forward:
    """One recorded forward of the model, and what its backward has brought so far."""

    num_samples: int
    calls: dict[str, int] = field(default_factory=dict)
    captured: dict[str, list[tuple[int, Call]]] = field(default_factory=dict)
    captured_modules: dict[str, list[ModuleCall]] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    done: bool = False


class Receiver(Protocol):
    """The owner of a capture: what it is told, and asked."""

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Layer], int]:
        """A forward is about to be recorded: the layers with the enclosing to capture, and the number of samples.

        A negative number leaves the forward out.
        """

    def expected(self, calls: dict[str, int]) -> bool:
        """A forward ended with so many calls of each layer: whether it is known where their samples are."""

    def layouts(self, layer: Layer, index: int, tensors: Sequence[Tensor | None], num_samples: int) -> list[Layout]:
        """Where the samples are in the output tensors of a layer's ``index``-th call."""

    def receive(self, layer: Layer, calls: list[Call], layouts: list[Layout], num_samples: int) -> None:
        """All calls of a layer with a rule, in one backward."""

    def receive_module(self, layers: list[Layer], calls: list[ModuleCall], num_samples: int) -> None:
        """All calls, in one backward, of a module whose parts the layers are."""

    def wants_gradients(self) -> bool:
        """Whether :meth:`finish` is to be given the parameters' whole gradients of this backward."""

    def finish(self, num_samples: int, received: set[str], gradients: dict[int, Tensor]) -> None:
        """A recorded backward ended: the layers it reached, and whole gradients by ``id(parameter)``."""


class Start:
    """How a enclosing was called: its arguments, before its other hooks see them, and the random state."""

    def __init__(self, capture: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments = (args, kwargs)
        self.random_state = get_random_state(capture.cuda)
        self.autocast = autocast_state()
        self.versions = [version(t) for t in tensors_in(self.arguments)]

    def require_untouched(self, layers: Sequence[Layer]) -> None:
        """Raise if the call overwrote its arguments, with which it is to run again."""
        if self.versions != [version(t) for t in tensors_in(self.arguments)]:
            raise AttributionError(
                f"the layers {[layer.name for layer in layers]} are measured by running a module of the model again, "
                "which overwrites its input in place: use an out-of-place operation, leave the layers out with "
                "layers=, or measure them with one-shot calls."
            )
