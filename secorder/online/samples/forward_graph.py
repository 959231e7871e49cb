"""The autograd graph of the one forward that a look differentiates, and what it tells by itself."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..._torch.engine import accumulate_node
from ..._torch.graph import Node, Users, users_of
from ..._torch.pytree import tensors_in
from ..._torch.sample_graph import InnerSizes, samples_in_nodes
from ..._torch.saved_tensors import keeps_arguments
from ..._torch.views import lasting_place
from ...layers.layout import Layout
from ...oneshot.recording import is_watch
from .hypotheses import floating
from .routes import selects_rows


class Watched(TorchFunctionMode):
    """Sees of a forward what its graph does not tell.

    Attributes:
        hooked: whether it puts hooks on its tensors' gradients, or asks for the graph's nodes, on which it could.
        selections: how often it selects rows by tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hooked, self.selections = False, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.selections += selects_rows(func, args)
        found = func(*args, **(kwargs or {}))
        if func is Tensor.register_hook:
            self.hooked |= not (len(args) > 1 and is_watch(args[1]))
        elif getattr(func, "__name__", "") == "__get__" and found is not None:
            asked = getattr(getattr(func, "__self__", None), "__name__", "") == "grad_fn"
            self.hooked |= asked and not keeps_arguments(found)
        return found


@dataclass(frozen=True, eq=False)
class ForwardGraph:
    """What one forward of a look computed."""

    output: Any  #: of the model
    options: Sequence[Sequence[Layout]]  #: where the samples may be in each of its floating-point tensors
    count: int  #: number of samples
    hooked: bool  #: whether hooks of the model's own may change gradients, which the graph does not tell
    leaves: Sequence[Tensor] = ()  #: that were added to layers' outputs, for the gradients there

    @cached_property
    def ends(self) -> list[tuple[Tensor, Layout]]:
        """The outputs that cotangents may be put on, and where the samples are in them."""
        pairs = zip(floating(self.output), self.options, strict=False)
        return [(f, o[0]) for f, o in pairs if o and f.requires_grad and not f.is_complex()]

    @cached_property
    def users(self) -> Users:
        """The graph itself."""
        return users_of(tensors_in(self.output))

    @cached_property
    def beside(self) -> Set[Node]:
        """What only outputs without samples depend on, such as a loss that the model returns: no cotangent tells it."""
        ends = {id(f) for f, _ in self.ends}
        if not ends or all(id(t) in ends for t in tensors_in(self.output) if t.requires_grad):
            return frozenset()
        return self.users.keys() - users_of([f for f, _ in self.ends]).keys()

    @cached_property
    def made_of(self) -> Literal["ends", "parameters", "more"]:
        """What numbers beside, such as a loss that the model returns, are made of: of the ends and constants alone?

        Or of parameters, too, from which no operation leads to the ends as well (a penalty)?
        """
        if not self._more and (self.ends or not self._numbers):
            return "ends"
        return "parameters" if self.ends and not any(node.next_functions for node in self._more) else "more"

    @cached_property
    def _places(self) -> set[tuple[Node | None, int]]:
        return {place for f, _ in self.ends for place in (lasting_place(f), (f.grad_fn, f.output_nr))}

    @cached_property
    def _numbers(self) -> list[Tensor]:
        """The numbers beside."""
        return [
            t
            for t in tensors_in(self.output)
            if t.numel() == 1 and t.requires_grad and (t.grad_fn, t.output_nr) not in self._places
        ]

    @cached_property
    def _more(self) -> list[Node]:
        """What numbers beside are made of that are not the ends."""
        numbers = self._numbers
        beside = self.beside & users_of(numbers, [f for f, _ in self.ends]).keys() if numbers else frozenset()
        leads_to = [edge for node in beside for edge in node.next_functions or ((node, 0),)]
        others = [x[0] for x in leads_to if x[0] is not None and x not in self._places]
        return [node for node in others if node not in beside or not node.next_functions]

    @cached_property
    def added(self) -> set[Node]:
        """The nodes that are none of the model's own: those that add the leaves."""
        return {user for leaf in self.leaves for user, _ in self.users.get(accumulate_node(leaf), ())}

    @cached_property
    def inner_sizes(self) -> InnerSizes | None:
        """Where it shows the samples to be (see :mod:`secorder._torch.sample_graph`); None where hooks pass it by."""
        if self.hooked or not self.ends or self.count == 1:
            return None
        sizes = [layout.inner_size(f.shape) for f, layout in self.ends]
        return samples_in_nodes([f for f, _ in self.ends], self.count, sizes)
