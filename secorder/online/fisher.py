"""The Fisher of the user's own passes: what records bring is made into squares and added up.

The squares of a layer are added as soon as its gradient is complete, so that its inputs are freed while the backward
goes on, or soon after, together with those of other small layers; :mod:`.closing` closes a record when its
backward has ended: what tied layers brought is put together, layers that the loss does not depend on get their zeros,
and the audit is compared.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._torch.autocast import autocast_enabled, no_autocast
from .._torch.surroundings import lasting
from ..layers.low_precision import Precision, is_low
from ..layers.per_sample import PerSample
from ..layers.rank_one import Plan
from ..layers.selection import Layer, MeasuredBy, ranks_of
from .audit.audited import Audited
from .audit.directions import Directions
from .audit.failures import Failures
from .audit.uncalled import Uncalled
from .doubts import Doubts
from .finite import all_finite, not_finite
from .losses.accumulation import Accumulation
from .losses.reduction import Weights, usable_scale
from .losses.sizes import Sizes
from .norm_sums import NormSums
from .record import Backward, Backwards, ForwardRecord
from .schedule import Kinds
from .stacked import Stacked
from .sums import ADDING, Held, LayerSums, add_whole, count_good, count_together, empty
from .troubles import Troubles
from .window_sums import WindowSums

#: What is summed up of a layer: the squares of each parameter's per-sample gradients, or their norms alone.
Accumulate = Literal["diagonal", "trace"]

_NAMES = map(str, count())


@dataclass(kw_only=True, eq=False, repr=False)
class OnlineFisher:
    """Σ of squared per-sample gradients of a model's layers, over the records of its forwards.

    See :class:`secorder.CurvatureProbe` for the arguments.
    """

    model: nn.Module
    layers: list[Layer]
    reduction: Literal["mean", "sum"] | Weights
    decay: float | None
    strict: bool
    loss_scale: Callable[[], float]
    returned: bool | None  #: whether it is the gradient on the loss that the model returns; None: untold
    on_nonfinite: Literal["skip", "raise", "keep"]
    forwards: Literal["separate", "joined"] | None
    penalty: Literal["shared"] | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    accumulate: Accumulate = "diagonal"
    precision: Precision = "auto"
    select: Callable[[nn.Module], Sequence[Layer]] | None = None  #: which layers a probe that is made now would measure

    def __post_init__(self) -> None:
        self.layers = list(self.layers)
        self.name = next(_NAMES)  # its own, by which code that is traced takes note of it
        self.directions = Directions()
        self.backwards = Backwards()
        self.others: deque[int] = deque(maxlen=8)  # backwards, the latest, that reached a forward that was not recorded
        self.draws = False  # whether forwards draw random numbers of Python's or NumPy's, or are run again
        self.assumed = ""  # of where samples are, to be said where the numbers are read
        self.reset()

    def fresh(self, accumulate: Accumulate | None = None) -> "OnlineFisher":
        """One with the same settings that has seen nothing, and accumulates the same unless it is told."""
        return replace(self, decay=None, strict=False, select=None, accumulate=accumulate or self.accumulate)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**vars(self), "backwards": Backwards(), "plans": {}, "held": None}

    @property
    def seen(self) -> Tensor:
        """Samples of all batches that count, float64."""
        self.settle()
        return self.counted

    @property
    def sums(self) -> dict[str, LayerSums]:
        """The sums of each layer, with all that waited to be added; see :attr:`by_layer` for what is not to wait."""
        self.settle()
        return self.by_layer

    @sums.setter
    def sums(self, sums: dict[str, LayerSums]) -> None:
        self.by_layer, self.stacked = sums, Stacked()
        self.plans: dict[Layer, Plan | None] = {}
        self.held: Held | None = None

    def marked(self) -> dict[str, str]:
        """By layer, why what was accumulated is not to be told, but for what audits have found."""
        return {**{x.name: reason for reason in self.doubts.read() for x in self.layers}, **self.troubles.marks}

    def settle(self) -> None:
        """Add the batches that wait to be added together with later ones."""
        self.norms.settle()
        if self.stacked.waiting:
            with ADDING, lasting():
                quietly(self.stacked.settle, self.by_layer, self.counted, self.troubles.marks)
        if self.uncounted:
            with ADDING, lasting():
                count_good(self.uncounted, self.by_layer, self.counted, self.troubles.marks)

    def count_later(self, names: tuple[str, ...], samples: int) -> None:
        """Count a batch that is good in all these layers, or of none of them in the model, when it is asked for."""
        before, batches = self.uncounted.get(names, (0, 0))
        self.uncounted[names] = before + samples, batches + 1

    @lasting()
    def reset(self) -> None:
        """Forget everything accumulated."""
        #: Those that parameters lie over, if any do: they decide alike, and sums and counts are those of all samples.
        self.ranks = ranks_of(self.model, self.layers)
        self.renew()
        for backward in list(self.backwards.values()):  # what waits to be added is forgotten, too
            for record in backward.records:
                record.waiting, record.elements_waiting = [], 0
                record.formed, record.elements_formed = [], 0
        self.failures = Failures(self.seen.new_zeros(len(self.layers), dtype=torch.long))
        self.audited = Audited()
        self.troubles = Troubles([layer.name for layer in self.layers], self.strict)
        self.earlier: WindowSums | None = None  # what was accumulated before the last look at a window
        self.called: set[str] = set()  # layers, in some recorded forward
        self.measured_by: dict[str, MeasuredBy] = {}  # what told the latest batch's per-sample gradients, by layer
        self.uncalled = Uncalled(self.layers)
        self.at_once = 1  # forwards that the latest backward ran through
        self.accumulation = Accumulation()
        self.losses, self.doubts = Kinds(), Doubts()  # those that were looked at, and what of others is not as there
        self.sizes = Sizes()

    @lasting()
    def renew(self, copied: Sequence[str] = ()) -> None:
        """Go on with empty sums; those of the layers whose sums have been copied are set to zero as they are."""
        diagonal, kept = self.accumulate == "diagonal", set(copied)
        others = [layer for layer in self.layers if layer.name not in kept]
        fresh = LayerSums.empty(others, self.device, self.dtype, diagonal=diagonal)
        if kept:
            empty([self.sums[name] for name in copied])
            fresh = {layer.name: fresh.get(layer.name) or self.sums[layer.name] for layer in self.layers}
        self.sums = fresh
        first = next(iter(fresh.values())).counts.device
        device = torch.device("cpu") if first.type == "meta" else first
        self.norms = NormSums.empty(len(self.layers), device)
        self.counted = torch.zeros((), dtype=torch.float64, device=device)
        #: Samples and batches that are good in layers, by their names; of no layers, those of the model.
        self.uncounted: dict[tuple[str, ...], tuple[int, int]] = {}
        self.batches = 0
        self.elsewhere = 0.0  # samples that other ranks had seen when they were synchronised

    def follow(self) -> None:
        """Keep what is counted where the parameters are."""
        self.plans.clear()
        for layer in self.layers:
            self.sums[layer.name].follow(layer, self.device, self.dtype)
        first = self.by_layer[self.layers[0].name].counts
        if self.counted.device != first.device:
            self.counted = self.seen.to(first)
            self.norms = self.norms.to(first.device)
            self.failures = self.failures.to(first.device)

    # ---- what records bring

    def factor(self, record: ForwardRecord) -> float:
        """What squares of g are multiplied by to be squares of ∂ℓ_n/∂z_n."""
        scale = float(record.num_samples**2) if record.mean else 1.0
        return scale / self.loss_scale_of(record.backward) ** 2

    def loss_scale_of(self, backward: Backward | None) -> float:
        """Asked for once in a backward: a ``GradScaler`` on an accelerator waits for the device to tell."""
        if backward is None:
            return usable_scale(self.loss_scale)
        if backward.loss_scale is None:
            backward.loss_scale = usable_scale(self.loss_scale)
        return backward.loss_scale

    def of_all(self, record: ForwardRecord) -> int:
        """Samples of the batch on all ranks that share the sums."""
        return record.num_samples if self.ranks is None else record.together

    @property
    def num_batches(self) -> int:
        """How many batches were recorded."""
        return self.batches + (0 if self.earlier is None else self.earlier.batches)

    def count_of(self, record: ForwardRecord) -> int | Tensor:
        """Samples that a batch counts for: all of them, or those that have a weight."""
        if self.ranks is not None:
            return record.counted_together
        return record.num_samples if record.counted is None else record.counted

    def add_squares(
        self, record: ForwardRecord, layer: Layer, parts: Sequence[Tensor | Sequence[PerSample]], good: Tensor | None
    ) -> None:
        """Add to each parameter's sum: Σ of squares, or those of the sum of per-sample gradients."""
        sums, low = self.by_layer[layer.name], self.low(record, layer)

        def add() -> None:
            sums.add(layer, parts, decay=self.decay, alpha=self._alpha(record), good=good, low=low)
            sums.count(self.count_of(record), good, self.decay, self.of_all(record))

        add_whole({layer.name: sums}, add, self.troubles.marks)
        if good is not None:
            record.goods.append(good)

    def add_together(
        self, record: ForwardRecord, layers: Sequence[Layer], add: Callable[..., None], goods: Tensor | None
    ) -> None:
        """The same for layers that are added together, by a function of their sums, by the parameters' names."""
        every = {layer.name: self.by_layer[layer.name] for layer in layers}
        outs = [dict(zip(layer.parameters, every[layer.name].sums, strict=True)) for layer in layers]

        def add_all() -> None:
            add(outs, beta=1.0 if self.decay is None else self.decay, alpha=self._alpha(record))
            count = self.count_of(record)
            if goods is None and self.decay is None and not isinstance(count, Tensor):
                self.count_later(tuple(every), count)
                return
            each = None if goods is None else goods.double().unbind()  # as counts are: one cast for all
            count_together([*every.values()], count, each, self.decay, self.of_all(record))

        add_whole(every, add_all, self.troubles.marks)
        if goods is not None:
            record.goods.append(goods)

    def _alpha(self, record: ForwardRecord) -> float:
        """What the squares of a record are multiplied by."""
        return self.factor(record) * (1.0 if self.decay is None else (1 - self.decay) / self.of_all(record))

    def low(self, record: ForwardRecord, layer: Layer) -> bool:
        """Whether the factors of a layer's squares are rounded to bfloat16."""
        first = next(iter(layer.parameters.values()))
        return is_low(self.precision, first.device, record.autocast_dtype or first.dtype)

    def good(self, layer: Layer, totals: Sequence[Tensor | None]) -> Tensor | None:
        """Whether a layer's gradients are finite, by the sums of their elements; None where every batch counts."""
        if self.on_nonfinite == "keep" or not totals:
            if self.ranks is not None:
                self.ranks.agree(layer.name, bad=False)
            return None
        good = all_finite([total for total in totals if total is not None])
        if self.ranks is not None:  # all ranks leave the batch out, or none
            good = good.new_tensor(not self.ranks.agree(layer.name, bad=not bool(good)))
        if self.on_nonfinite == "raise" and not bool(good):
            raise not_finite(layer.name)
        return good


def quietly(work: Callable[..., Any], *arguments: Any) -> None:
    """Do work that is not to be differentiated, in the dtypes that tensors have, inside of the user's backward."""
    if torch.is_grad_enabled() or autocast_enabled():
        with torch.no_grad(), no_autocast():
            work(*arguments)
    else:
        work(*arguments)
