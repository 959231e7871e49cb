"""All that is known of one forward of the model, from its beginning to the end of its backward: one record.

The phases of a record, and what ends it::

    begin ──► running ──► waiting ──► entered ──► added
                │            │           │
                │            │           ├─ the backward is broken off: the layers that had their gradient are counted,
                │            │           │  each by itself, and the others are not
                │            │           └─ a second backward through the same graph: the layers it reaches are marked
                │            ├─ the backward never comes, or is torch.autograd.grad's: dropped with the graph
                │            └─ it is not known where samples are: the layers are marked once a backward comes
                └─ an exception, an empty batch, nothing to differentiate: dropped

Records know nothing of one another. Two forwards in flight, train and eval mixed, threads: each fills its own, since a
hook holds the record that it was made for. What several forwards share that one backward runs through is a
:class:`Backward`.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .._torch.compile import EagerSection, never_compiled
from .._torch.engine import accumulate_node, first_gradient_hook
from .._torch.own_hooks import FirstHooks
from .._torch.saved_tensors import checkpoint_section
from .._torch.versions import version
from ..layers.rank_one import RankOne
from ..layers.selection import Layer
from .audit.freivalds import Audit
from .changed_gradients import WatchedHooks
from .layer_record import LayerRecord, Start
from .samples.attribution import Attribution
from .samples.relation import Shape

#: What is in ``.grad`` of a parameter: an ``id`` and how often it was changed; None where there is nothing.
Slot = tuple[int, int] | None

#: Threads put hooks on parameters, and take them off, one after the other.
HOOKING = threading.Lock()


class Backward:
    """One backward pass, and the records of the forwards that it runs through."""

    ended = False  #: whether it has ended, or is known to have been broken off
    partial = False  #: whether it is seen to leave out a part of the graph (``inputs=``)
    alone = True  #: whether no other thread ran a backward at the same time
    #: parameters, by ``id``, whose gradient has changed between the end of the forward and this pass's first gradient:
    #: where no more comes, they are used in the loss alone
    early: frozenset[int] = frozenset()
    takes_norms = False  #: whether the norms of its per-sample gradients are taken
    audited: Set[str] = frozenset()  #: the layers that the audit looks at, of those that the first forward has called
    loss_scale: float | None = None  #: what the loss was multiplied by; None until it is needed

    def __init__(self, number: int, audit: Audit) -> None:
        self.number = number  #: the engine's
        self.thread = threading.get_ident()  #: that it runs in
        self.records: list[ForwardRecord] = []  #: in the order in which their gradients came
        self.handles: list[RemovableHandle] = []  #: of what is hung on parameters while it runs
        #: parameters without a gradient when it began: what they have at its end is this pass's
        self.fresh: list[Tensor] = []
        self.whole: dict[int, Tensor] = {}  #: gradients of parameters, by ``id``, where they may hold a penalty
        #: the layers of which the norm of the batch's gradient is that of the calls' own sum
        self.by_factors: set[str] = set()
        #: of whole gradients, by ``id`` of the parameter; None where it came in parts
        self.norms: dict[int, Tensor | None] = {}
        #: parameters without a gradient when it began, whose norm is to be read at its end
        self.unread: list[Tensor] = []
        self.audit = audit  #: of the parameters' whole gradients

    def on_gradient(self, leaf: Tensor, hook: Callable[[Tensor], None], *, gathered: bool = False) -> None:
        """Call a hook with the whole gradient of a leaf, before hooks on the leaf change it.

        Of a leaf that FSDP2 gathers and frees again, it is called at the leaf's node.
        """
        with HOOKING:
            if gathered:
                self.handles.append(accumulate_node(leaf).register_prehook(partial(_first, hook)))
            else:
                self.handles.append(first_gradient_hook(leaf, hook))

    def let_go(self) -> None:
        """It has ended, or was broken off: nothing of ours stays on the model."""
        self.ended = True
        if self.handles:
            with HOOKING:
                for handle in self.handles:
                    handle.remove()
                self.handles.clear()
        for record in self.records:
            record.unhook()


@never_compiled
def _first(hook: Callable[[Tensor], None], gradients: tuple[Tensor | None, ...]) -> None:
    if gradients[0] is not None:
        hook(gradients[0])


class Backwards(dict[int, Backward]):
    """The backward passes that run, by the engine's number."""

    def here(self) -> list[Backward]:
        """Those of this thread."""
        return [backward for backward in list(self.values()) if backward.thread == threading.get_ident()]

    def begin(self, backward: Backward) -> None:
        """This one begins; where another thread's runs, what is in ``.grad`` may be either's.

        It is among those that run before others are looked for, so that of two that begin at once one sees the other.
        """
        self[backward.number] = backward
        for other in list(self.values()):
            if other is not backward:
                other.alone = backward.alone = False

    def end(self, backward: Backward) -> None:
        """This one has ended, or was broken off."""
        backward.let_go()
        self.pop(backward.number, None)  # not before: what begins now is alone


def slot(parameter: Tensor) -> Slot:
    """What tells whether something was accumulated in ``.grad`` since."""
    return None if parameter.grad is None else (id(parameter.grad), version(parameter.grad))


class ForwardRecord:
    """One forward; see the module's text for its phases. What only some come to is the class's until then."""

    #: how the model was called; forgotten at the forward's end unless the model is to run again
    start: Start | None = None
    carried: Sequence[Tensor] = ()  #: what modules carry from the forward before, while this one runs
    #: layers whose own calls do not tell their samples in this batch: the whole model runs again for them
    fallback: Sequence[Layer] = ()
    root: Layer | None = None  #: the layer that is measured by calls of the whole model, or the first that is
    elements_waiting: int = 0  #: of the factors of layers that wait
    elements_formed: int = 0  #: of squares that do
    autocast_dtype: torch.dtype | None = None  #: of the latest call, or that of FSDP2's policy of mixed precision
    mean: bool = True  #: whether the loss is a mean over the samples
    weights: Tensor | None = None  #: 1 / c_n for L = Σ_n c_n ℓ_n, shape (N,), where the reduction tells them
    #: whether it is told what training multiplies its loss by
    scale_told: bool = False
    counted: Tensor | None = None  #: how many samples have a loss at all, where the reduction tells
    #: whether it waits to be added, and its samples to be counted, with those of later backward passes
    stacked: bool = False
    together: int = 0  #: samples on all ranks that parameters lie over
    counted_together: int = 0  #: of these, how many have a loss at all
    #: whether layers run again in backward (activation checkpoints), so that they are to be hooked again
    recomputes: bool = False
    sections: WeakSet[Any] | None = None  #: the parts of the forward that do, where checkpoints tell
    #: what ``.grad`` of parameters was when the forward had ended, by ``id``; None where that was not seen
    slots: dict[int, Slot] | None = None
    #: whether the latest backward that came to the model's output is to be differentiated itself
    create_graph: bool = False
    backward: Backward | None = None  #: the pass that is running through this forward
    began: int = 0  #: how many nodes of graphs its thread had made when it began
    ended: int = 0  #: and when it had ended
    #: of each floating-point tensor that it returned, the number of its node, and which of that node's outputs it is
    ends: Sequence[tuple[int, int] | None] = ()
    closed: bool = False  #: nothing is to be added any more
    unreturned: bool = False  #: whether the forward ended without an output: it returned none, or raised
    eager: EagerSection | None = None  #: the section in which nothing is compiled, while the forward runs
    nested: bool = False  #: whether the model was called again while it runs, as by itself
    #: the engine's number of the latest backward that came once it was closed, and which layers it reaches
    again: tuple[int, Tensor] | None = None

    def __init__(
        self,
        attribution: Attribution,
        num_samples: int,
        shapes: tuple[Shape, ...],
        *,
        verified: bool,
        scheduled: bool = False,
        unattributed: str = "",
    ) -> None:
        self.attribution = attribution  #: where samples are in the layers, as it was known when the forward began
        self.num_samples = num_samples  #: of the batch
        self.shapes = shapes  #: of the tensors among the model's arguments
        self.verified = verified  #: whether this very batch was looked at
        self.scheduled = scheduled  #: whether it is one of those of which the loss is looked at
        #: why it is not known where samples are, said once a backward comes; else empty
        self.unattributed = unattributed
        self.thread = threading.get_ident()
        #: the numbers of the nodes that layers' calls have ended with, and the names of those that they began behind
        self.path: list[tuple[Any, ...]] = []
        #: of the layers' hooks, while the forward runs
        self.handles: list[RemovableHandle | FirstHooks | WatchedHooks] = []
        self.layers: defaultdict[str, LayerRecord] = defaultdict(LayerRecord)  #: by name, what is known of each
        self.waiting: list[RankOne] = []  #: layers that are to be added together
        #: layers' squares that are to be added together, those of a layer's parameters one after the other
        self.formed: list[tuple[Layer, Tensor]] = []
        #: of layers that were added, one by one or together, whether their gradients are finite
        self.goods: list[Tensor] = []
        #: by ``id`` of a parameter, what calls bring of its whole gradient, where a penalty is told of
        self.totals: dict[int, Tensor] = {}
        #: the sizes of what came to scalars that the model returned, where they are watched; None for another output
        self.scales: list[float | None] = []

    def unhook(self) -> None:
        """The layers' hooks go."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def note_digits(self, kind: torch.dtype, dtypes: Iterable[torch.dtype]) -> None:
        """A part of the model may compute in fewer digits than its parameters have."""
        for dtype in dtypes:
            if dtype is not kind and dtype.is_floating_point and torch.finfo(dtype).eps > torch.finfo(kind).eps:
                self.autocast_dtype = self.autocast_dtype or dtype

    @property
    def called(self) -> list[str]:
        """The names of the layers that were called."""
        return [name for name, own in self.layers.items() if own.calls]

    def runs_in(self, number: int) -> bool:
        """Whether this backward pass is the one that runs through it, and nothing is closed yet."""
        return self.backward is not None and self.backward.number == number and not self.closed

    def leave_out(self, names: Iterable[str]) -> None:
        """Nothing more is done for these layers, and what is to be added at the end is not."""
        for name in names:
            self.layers[name].troubled, self.layers[name].norms = True, None

    def of_another(self) -> bool:
        """Whether what a checkpoint computes again, in backward, is a part of another forward."""
        section = checkpoint_section()
        return section is not None and (self.sections is None or section not in self.sections)

    def parts_of(self, layer: Layer) -> Sequence[Layer]:
        """The layers that are measured by the calls of a layer's enclosing module, those of which it stands for."""
        if any(x is layer for x in self.fallback):
            return self.fallback
        others = self.attribution.layers
        return [x for x in others if x.measured_by == "rerun" and x.enclosing is layer.enclosing]

    def strategy(self, name: str) -> tuple[Any, ...]:
        """How a layer is measured in this forward."""
        return next(x.strategy for x in (*self.fallback, *self.attribution.layers) if x.name == name)

    def moved(self, parameter: Tensor) -> bool:
        """Whether something was accumulated in ``.grad`` since the forward ended."""
        if parameter.grad is None or self.slots is None:
            return False
        return slot(parameter) != self.slots.get(id(parameter))

    def held(self, parameter: Tensor) -> bool:
        """Whether something was in ``.grad`` when the forward ended."""
        return self.slots is None or self.slots.get(id(parameter)) is not None

    def parameters(self, layer: Layer) -> dict[str, Any]:
        """The layer's parameters as the autograd graph knows them: under FSDP2, whole ones while the layer runs."""
        return self.layers[layer.name].gathered or layer.parameters
