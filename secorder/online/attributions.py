"""What is known of where samples are, for each combination of modes and of what is trained, and when to look again.

What is frozen decides, too, by which strategy a layer is measured: no gradient may come to it, or no graph hold it.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import nn

from .._caution import caution
from .._torch.autocast import no_autocast
from .._torch.fsdp import reshard
from .._torch.modules import backward_hooks_removed, is_scripted, modules_in, parameter_table
from ..layers.selection import Layer
from ..layers.structure import independent_by_structure
from ..oneshot.isolation import run_isolated
from .carried import carried_cut_off
from .losses.returned import not_as_specified
from .samples.attribution import Attribution, merged
from .samples.hypotheses import SampleDim, shapes_of
from .samples.relation import Shape, explain
from .samples.search import attribute
from .schedule import Kinds, now_and_then

#: One recorded batch in so many is looked at again; and shapes, and modes, of which it is remembered what is known.
ONE_IN, REMEMBERED = 100, 256

#: Batches without a gradient from which on a layer is taken for one that gets none.
LONG_BLANK = 64

#: Batches from which on a use that never got one is told by another at the same place: gates open in the first steps.
SETTLED = 4

_TRAINING = attrgetter("training")

#: Which modules are in train mode, and which parameters require a gradient.
Mode = tuple[tuple[bool, ...], tuple[bool, ...]]


class Attributions:
    """Attributions of one model's layers."""

    def __init__(self, model: nn.Module, sample_dim: SampleDim) -> None:
        self._model = model
        self._sample_dim = sample_dim
        self._take_modules()
        #: By modes, and by how many dimensions each of the arguments has; the latest last.
        self._known: dict[Mode, dict[tuple[int, ...], Attribution]] = {}
        self._batches: dict[Mode, int] = {}
        #: By modes and shapes, what is known and how many samples that makes, where shapes alone tell it.
        self._met: dict[tuple[Any, Any], tuple[Attribution, int | None]] = {}
        self._not_followed: set[str] = set()
        self.graphs = Kinds()  #: forwards that were looked at, by what their graphs are made of

    def __getstate__(self) -> dict[str, Any]:
        anew = {"_known": {}, "_batches": {}, "_met": {}, "graphs": Kinds()}  # its copy is to be looked at again
        return {**vars(self), **anew}

    def meet(self, arguments: Any, shapes: Sequence[Shape]) -> tuple[Attribution | None, int | None, bool]:
        """What is known of where the samples of a batch are, how many they are, and whether it is :meth:`scheduled`."""
        mode = self._mode()
        known, count = self._met.get((mode, shapes), (None, None))
        if known is None:
            known = self.known(shapes)
            count = None if known is None else known.count(arguments, shapes)
            if known is not None and known.grouping is None:
                if len(self._met) >= REMEMBERED:
                    self._met.clear()
                self._met[mode, shapes] = known, count
        return known, count, self.scheduled(mode, known)

    def known(self, shapes: Sequence[Shape]) -> Attribution | None:
        """For the modes of now, and arguments of these shapes."""
        known = self._known.get(self._mode(), {})
        found = known.get(_ranks(shapes))
        if found is not None or not known:
            return found
        latest = list(known.values())[-1]
        return latest if latest.grouping is not None else None  # of a list, however long, or any graphs

    def any_known(self) -> Attribution | None:
        """For any modes."""
        return next((found for known in self._known.values() for found in known.values()), None)

    def _take_modules(self) -> None:
        self._modules = modules_in(self._model)
        self._tables = [parameter_table(module) for module in self._modules if not is_scripted(module)]

    def _mode(self) -> Mode:
        trained = [p.requires_grad for table in self._tables for p in table.values() if p is not None]
        return tuple(map(_TRAINING, self._modules)), tuple(trained)

    def scheduled(self, mode: Mode, found: Attribution | None) -> bool:
        """Count a recorded batch: whether it is to be looked at (1, 2, 4, 8, …, and now and then), as it is known."""
        batch = self._batches[mode] = self._batches.get(mode, 0) + 1
        if found is None or found.provisional:
            return True
        if found.untested:
            if batch == LONG_BLANK:
                name = min(found.untested)
                caution(
                    f"no gradient came to {name} in {batch} recorded batches, so that each was a verification batch, "
                    "which takes about three times as long as a step: leave a layer that gets none out with "
                    f"layers='!{name}'."
                )
            return True
        return batch & (batch - 1) == 0 or now_and_then(batch, ONE_IN)

    def certain(self, found: Attribution | None) -> bool:
        """Whether the model's structure leaves no doubt of what is known: only its loss is to be looked at."""
        return found is not None and self._sample_dim in (None, 0) and independent_by_structure(self._model, 0)

    def verify(
        self, layers: Sequence[Layer], args: tuple[Any, ...], kwargs: dict[str, Any], reduction: Any = None
    ) -> Attribution:
        """Look at a batch; what it tells of the layers is kept for the modes of now.

        With a reduction, a loss that the model returns is looked at, too.
        """
        mode = self._mode()
        if len(self._known) >= REMEMBERED and mode not in self._known:  # layers may be frozen at random
            self._known.clear()
            self._batches.clear()
        known = self._known.setdefault(mode, {})
        ranks = _ranks(shapes_of((args, kwargs)))
        before = known.get(ranks) or next((x for x in reversed(known.values()) if not (x.undecided or x.coupled)), None)
        if before is not None and before.provisional:
            before = None
        reshard(self._model)
        # The user's backward hooks are for the user's backward.
        with (
            backward_hooks_removed(self._model.modules()),
            carried_cut_off(self._model) as carries,
            no_autocast(),  # what belongs to which sample shows best in full precision
        ):
            found = run_isolated(
                lambda direct: attribute(
                    self._model,
                    layers,
                    args,
                    kwargs,
                    self._sample_dim,
                    before=before,
                    direct=direct,
                    not_followed=self._not_followed,
                )
            )
        if found.unclear or (found.undecided and found.provisional):
            return found
        if reduction is not None and not found.undecided:
            with carried_cut_off(self._model), no_autocast():
                told = not_as_specified(self._model, reduction, found, args, kwargs)
            # Of what is weighted as a function tells, each part has weights of its own.
            as_specified = {place for place, reason in told.items() if callable(reduction) and not reason}
            unreduced = {place: reason for place, reason in told.items() if reason and place.module is None}
            found = replace(found, unreduced=unreduced, coupling=found.coupling - as_specified)
        settled = found.repeated if self._batches.get(mode, 0) >= SETTLED else frozenset()
        found = replace(found, carries=carries, untested=found.untested - settled)
        self._met.clear()
        known.pop(ranks, None)
        known[ranks] = found if before is None or found.undecided else merged(before, found)
        return found

    @staticmethod
    def moved(before: Attribution, after: Attribution) -> list[str]:
        """Layers whose rows a new look does not find where they were verified before."""
        if before.dims != after.dims and not (before.coupled or after.coupled or after.undecided):
            places = zip(before.dims, after.dims, strict=False)
            if (
                any(None not in pair and pair[0] != pair[1] for pair in places)
                and before.grouping is None
                and before.count_by_shapes(after.shapes) is not None
            ):
                return [layer.name for layer in before.layers]
        by_name = {x.name: x for x in after.layers}
        moved = []
        for layer in before.layers:
            calls = before.known.get(layer.name, ())
            if not calls or layer.name in before.unknown | before.outside | before.untested | after.hidden:
                continue
            if layer.strategy != by_name.get(layer.name, layer).strategy or any(
                explain(calls, now.place, now.shape, now.arguments, now.num_samples) not in (None, now.layout)
                for now in after.known.get(layer.name, ())
                if now.layout is not None
            ):
                moved.append(layer.name)
        return moved

    def give_up_on(self, names: Collection[str]) -> None:
        """Measure layers by their modules, whose operations a checkpoint hides."""
        if not self._not_followed.issuperset(names):
            self._not_followed |= set(names)
            self.forget()

    def forget(self) -> None:
        """The model is not what it was: look again."""
        self._take_modules()
        self._known.clear()
        self._met.clear()
        self._batches.clear()
        self.graphs = Kinds()


def _ranks(shapes: Sequence[Shape]) -> tuple[int, ...]:
    return tuple(map(len, shapes))
