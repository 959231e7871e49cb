"""Where the samples are in each layer, as far as it is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn

from ..._torch.modules import Place
from ..._torch.pytree import tensors_in
from ...layers.layout import Layout
from ...layers.selection import Layer
from ...layers.tying import Ties
from ...layers.uses import Route
from ...owners import Grouping
from .beside import Beside
from .relation import Shape, Verified


@dataclass(frozen=True)
class Attribution:
    """What is known of where samples are, for one combination of train and eval modes."""

    #: the layers, with the enclosing modules whose calls tell all: they themselves, or a part of the model
    layers: tuple[Layer, ...] = ()
    #: for each tensor among the model's arguments, the dimension that holds the samples
    dims: tuple[int | None, ...] = ()
    grouping: Grouping | None = None  #: how samples own these tensors, where no dimension holds them
    shapes: tuple[Shape, ...] = ()  #: of these tensors in this batch
    known: Mapping[str, tuple[Verified, ...]] = field(default_factory=dict)  #: by layer, the calls that were verified
    #: for each of the model's outputs in this batch, where the samples are in it
    outputs: tuple[Layout | None, ...] = ()
    #: what numbers beside, such as a loss, are made of: of those that have samples alone; of parameters, too; of more
    made_of: Literal["ends", "parameters", "more"] = "ends"
    unknown: frozenset[str] = frozenset()  #: layers of whose calls no dimension was found to hold the samples
    #: those of them whose gradients are not in proportion to those on the model's outputs; see :mod:`.linear_backward`
    not_linear: frozenset[str] = frozenset()
    #: layers whose parameters the model also uses outside of the calls of their enclosing modules
    outside: frozenset[str] = frozenset()
    reached: frozenset[str] = frozenset()  #: layers whose calls the model's output depends on
    #: layers that no gradient came to, though it might, so that zeros would do for samples anywhere: to be seen again
    untested: frozenset[str] = frozenset()
    #: those of which another use at the same place got some: after a few batches it is taken to tell of these
    repeated: frozenset[str] = frozenset()
    coupled: bool = False  #: whether samples influence one another in the model
    #: whether they do by batch normalisation, or by ranges of fake quantisation, alone; the rest is then known for
    #: fixed statistics
    normalised: bool = False
    unclear: bool = False  #: whether the output held nan or inf, so that nothing can be told from this batch
    #: whether the batch could not tell where samples are (a batch of one, or nothing changed anything)
    provisional: bool = False
    undecided: str = ""  #: why it cannot be told which dimension holds the samples; empty where it can
    separable: int | None = None  #: another dimension that separates, where the one that was told does not
    alternative: int | None = None  #: another dimension that would do as well as the one that was taken
    certain: bool = False  #: whether the model is a chain of torch's own layers, whose structure leaves no doubt
    #: the layers whose gradient is to be put together from that of several; see :func:`tied_layers`
    ties: Ties = field(default_factory=dict)
    changing: tuple[Place, ...] = ()  #: the buffers that a forward overwrites
    #: by layer that is measured by operations, those that are followed; see :mod:`secorder.layers.uses`
    routes: Mapping[str, frozenset[Route]] = field(default_factory=dict)
    #: layers whose operations cannot be followed, since a checkpoint computes them again
    hidden: frozenset[str] = frozenset()
    selections: int = 0  #: how often a forward selected rows by tensors; see :mod:`.routes`
    #: where the forward makes what couples samples where a loss uses it, beside outputs of samples
    coupling: frozenset[Beside] = frozenset()
    #: why a loss that the model returns is not made of its samples' as is told, by where it is
    unreduced: Mapping[Beside, str] = field(default_factory=dict)
    #: whether modules carry something from one forward to the next; see :mod:`secorder.online.carried`
    carries: bool = False
    #: what was made of calls that came, by layer, shapes of the arguments, samples, and the calls' shapes
    explained: dict[tuple[Any, ...], list[list[Layout | None]] | None] = field(default_factory=dict, compare=False)

    @cached_property
    def by_operations(self) -> bool:
        """Whether any layer is measured by operations, so that a forward's graph is gone through."""
        return any(layer.by_operations for layer in self.layers)

    @cached_property
    def by_rule(self) -> tuple[Layer, ...]:
        """The layers whose calls are seen."""
        return tuple(x for x in self.layers if x.measured_by == "rule")

    @cached_property
    def by_module(self) -> tuple[Layer, ...]:
        """Of each module that runs again the first of the layers that are measured so."""
        found = {id(x.enclosing): x for x in reversed(self.layers) if x.measured_by == "rerun"}
        return tuple(reversed(found.values()))

    def reruns(self, model: nn.Module) -> bool:
        """Whether a layer is measured by running the model again."""
        return any(x.enclosing is model for x in self.by_module)

    def holders(self, name: str) -> set[str]:
        """The layers that hold a parameter of a layer whose gradient is put together."""
        return {holder for by in self.ties.get(name, {}).values() for holder, _ in by}

    def sharing(self, name: str) -> list[str]:
        """The layers whose gradient is put together, and takes part of what a layer's calls bring."""
        if not self.ties:
            return []
        return [own for own, by in self.ties.items() if any(name == h for holders in by.values() for h, _ in holders)]

    def owners(self, name: str) -> list[str]:
        """The layers whose number a layer's calls take part in: those that share a parameter with it, or it alone."""
        return self.sharing(name) or [name]

    def count(self, arguments: Any, shapes: Sequence[Shape] | None = None) -> int | None:
        """The number of samples of a batch, by its arguments; None where these contradict what is known."""
        if self.grouping is None:
            return self.count_by_shapes(shapes or [tuple(t.shape) for t in tensors_in(arguments)])
        owned = self.grouping.of(arguments)
        return None if owned is None else owned.num_samples

    def count_by_shapes(self, shapes: Sequence[Shape]) -> int | None:
        """The number of samples where a dimension holds them; None where the shapes contradict what is known."""
        if len(shapes) != len(self.dims):
            return None
        sizes = set()
        for shape, dim in zip(shapes, self.dims, strict=True):
            if dim is not None:
                if len(shape) <= dim:
                    return None
                sizes.add(shape[dim])
        if not sizes:
            return None if self.undecided else 1  # each call is one sample
        if 0 in sizes:
            return 0
        return max(sizes) if len(sizes - {1}) <= 1 else None


def merged(before: Attribution, after: Attribution) -> Attribution:
    """What a new look found, with what earlier ones verified of the layers that are captured as they were."""
    same = {x.name for x in after.layers if x in before.layers} - before.untested
    known = {
        name: _latest((*after.known.get(name, ()), *(before.known.get(name, ()) if name in same else ())))
        for name in {**before.known, **after.known}
    }
    return replace(
        after,
        known=known,
        coupling=before.coupling | after.coupling,
        unreduced={**before.unreduced, **after.unreduced},
        carries=before.carries or after.carries,
        explained={},
    )


def _latest(calls: Sequence[Verified]) -> tuple[Verified, ...]:
    """The latest sixteen of what was verified at each place."""
    at: dict[int | str, int] = {}
    kept = []
    for seen in dict.fromkeys(calls):
        at[seen.place] = at.get(seen.place, 0) + 1
        if at[seen.place] <= 16:
            kept.append(seen)
    return tuple(kept)
