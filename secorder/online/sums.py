"""The sums of each layer: squared per-sample gradients, and the number of samples. Nothing is read on the host."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch.host_copy import begin_copy, goes_to_host
from .._torch.several import add_each, add_products, set_to_zero
from .._torch.versions import versions
from ..layers.dtypes import compute_dtype, zeros
from ..layers.low_precision import contraction
from ..layers.per_sample import PerSample
from ..layers.selection import Layer
from ..parallel.fsdp import shard_of_sum

#: Threads add to sums one after the other.
ADDING = threading.RLock()

_INTERRUPTED = (
    "adding a batch to its sums was broken off ({}), so that they hold a part of it: call reset(), or "
    "load_state_dict() with a state that was saved before."
)


class Arriving(NamedTuple):
    """A sum of squares on its way to the host: ``total ← beta · total + alpha · arrived()``."""

    arrived: Callable[[], Tensor]
    total: Tensor
    beta: float
    alpha: float


@dataclass
class LayerSums:
    """Σ of squared per-sample gradients of one layer (or their moving average), by parameter."""

    totals: list[Tensor]  #: 1-D, one a parameter; read as :attr:`sums`, which waits for what is on its way to them
    #: what is in them, float64 on the layer's device: samples; their weight in a moving average; batches
    counts: Tensor
    batches: int = 0  #: that were handed in, bad ones among them
    decays: int = 0  #: how often a moving average has moved on
    _increments: dict[tuple[float, float], Tensor] = field(default_factory=dict)
    _arriving: list[Arriving] = field(default_factory=list)

    @property
    def sums(self) -> list[Tensor]:
        """The sums, with what was on its way from an accelerator to the host."""
        while self._arriving:
            part = self._arriving[0].arrived()  # where an interrupt may come, before it is taken from the list
            here = self._arriving.pop(0)
            _decayed(here.total, here.beta).add_(part.to(here.total), alpha=here.alpha)
        return self.totals

    @sums.setter
    def sums(self, totals: list[Tensor]) -> None:
        self._arriving.clear()
        self.totals = totals

    def __getstate__(self) -> dict[str, Any]:
        assert self.sums is self.totals  # nothing is on its way
        return self.__dict__.copy()

    @classmethod
    def empty(
        cls,
        layers: Sequence[Layer],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        diagonal: bool = True,
    ) -> "dict[str, LayerSums]":
        """Of layers that have seen nothing, by name; what is in them is counted in the rows of one table a device.

        Without a diagonal, they have no sums.
        """
        of = Counter(map(_device, layers))
        rows = {place: iter(torch.zeros(size, 3, dtype=torch.float64, device=place)) for place, size in of.items()}
        found = {}
        for layer in layers:
            parts = zeros(layer) if diagonal else []
            if device is not None or dtype is not None:
                parts = [z.to(device, dtype) for z in parts]
            found[layer.name] = cls(parts, next(rows[_device(layer)]))
        return found

    def follow(self, layer: Layer, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Move to where the layer's parameters are by now: a model may be moved after a probe was attached to it."""
        here = self.counts.device
        there = _device(layer)
        if here == there:
            return
        fresh = LayerSums.empty([layer], device, dtype, diagonal=bool(self.sums))[layer.name]
        if here.type != "meta":  # where there is no memory, nothing was added
            fresh.counts = self.counts.to(fresh.counts)
            fresh.sums = [mine.to(new) for mine, new in zip(self.sums, fresh.sums, strict=True)]
        self.sums, self.counts = fresh.sums, fresh.counts
        self._increments = {}

    def to(self, device: torch.device | str, *, copy: bool = False) -> "LayerSums":
        """The same on another device."""
        sums = [total.to(device, copy=copy) for total in self.sums]
        return LayerSums(sums, self.counts.to(device, copy=copy), self.batches, self.decays)

    def add(
        self,
        layer: Layer,
        parts_of: Sequence[Tensor | Sequence[PerSample]],
        *,
        decay: float | None,
        alpha: float,
        good: Tensor | None = None,
        low: bool = False,
    ) -> None:
        """Add to each parameter's sum α times a sum of squares, or α Σ_n (Σ_i u_{i, n})² of per-sample gradients.

        Sums of squares that are handed in are overwritten. With ``low``, by matrix products of factors in bfloat16.
        """
        beta = 1.0 if decay is None else decay
        contract = contraction(low)
        kind = compute_dtype(layer)
        for p, numel, total, parts in zip(layer.parameters.values(), layer.sizes(), self.sums, parts_of, strict=True):
            if isinstance(parts, Tensor):
                part = parts if good is None else parts.nan_to_num_().mul_(good)
            elif not parts:
                _decayed(total, beta)
                continue
            elif not layer.sharded and total.dtype is kind and total.device == p.device:
                contract(parts, numel=numel, out=total, beta=beta, alpha=alpha, keep=good)
                continue
            else:
                part = contract(parts, numel=numel, keep=good)
            if layer.spread is not None and layer.sharded:  # each rank's α is that of its own samples
                _decayed(total, beta).add_(shard_of_sum(part.mul_(alpha), p, layer.spread).to(total))
            elif goes_to_host(part, total):
                self._arriving.append(Arriving(begin_copy(part), total, beta, alpha))
            else:
                _decayed(total, beta).add_(part.to(total), alpha=alpha)

    def count(self, samples: float | Tensor, good: Tensor | None, decay: float | None, size: int | None = None) -> None:
        """Count a batch of so many samples, of ``size``; not where it is not good (a bool on the layer's device)."""
        count_together([self], samples, None if good is None else [good], decay, size)

    def _increment(self, samples: float | Tensor, decay: float | None, size: int | None) -> Tensor:
        weight = samples if decay is None else (1 - decay) * (1.0 if size is None else samples / size)
        if isinstance(samples, Tensor):  # counted on the device
            parts = [torch.as_tensor(x, dtype=torch.float64, device=self.counts.device) for x in (samples, weight, 1.0)]
            return torch.stack(parts)
        key = (float(samples), float(weight))
        if key not in self._increments:
            if len(self._increments) > 8:
                self._increments.clear()
            self._increments[key] = self.counts.new_tensor([samples, weight, 1.0])
        return self._increments[key]


class Held(NamedTuple):
    """Where parameters of layers are held as long as nobody exchanges or moves them."""

    #: the layers' modules, the names by which these know them, and whether a module in them holds them
    places: list[tuple[nn.Module, str, bool]]
    parameters: list[int]  #: that are to be there, by ``id``
    devices: list[torch.device | None]  #: where their layers are counted; None for one without memory


def add_whole(every: Mapping[str, LayerSums], add: Callable[[], None], marks: dict[str, str]) -> None:
    """Add to layers' sums, by their names; a mark tells of each in which a part of a batch is left, if broken off."""
    with ADDING:
        before = versions([total for sums in every.values() for total in sums.totals])
        try:
            add()
        except BaseException as error:  # out of memory, an interrupt
            for name, sums in every.items():
                seen, before = before[: len(sums.totals)], before[len(sums.totals) :]
                if seen != versions(sums.totals):
                    marks[name] = _INTERRUPTED.format(type(error).__name__)
            raise


def count_together(
    every: Sequence[LayerSums],
    samples: float | Tensor,
    goods: Sequence[Tensor] | None,
    decay: float | None,
    size: int | None = None,
    *,
    batches: int = 1,
) -> None:
    """:meth:`LayerSums.count` of several layers on one device: whether a batch is good, or how many of several."""
    for sums in every:
        sums.batches += batches
        if decay is not None:
            sums.decays += 1
            sums.counts[1].mul_(decay)
    counts, increments = [sums.counts for sums in every], [every[0]._increment(samples, decay, size)] * len(every)
    if goods is None:
        add_each(counts, increments)
    else:
        add_products(counts, increments, goods)


def count_good(
    waiting: dict[tuple[str, ...], tuple[int, int]], every: Mapping[str, LayerSums], seen: Tensor, marks: dict[str, str]
) -> None:
    """Count samples and batches that are good in layers, by the names of these; of no layers, the samples in ``seen``.

    A mark tells of all layers if it is broken off.
    """
    try:
        for names, (samples, batches) in waiting.items():
            for sums in [every[name] for name in names]:
                sums.batches += batches
                sums.counts.add_(sums.counts.new_tensor([samples, samples, batches]))
            if not names:
                seen.add_(samples)
        waiting.clear()
    except BaseException as error:
        marks.update(dict.fromkeys(every, _INTERRUPTED.format(type(error).__name__)))
        raise


def count_samples(seen: Tensor, samples: float | Tensor, goods: Sequence[Tensor], layers: int) -> None:
    """Count the samples of a batch in ``seen``, unless every layer left it out, as far as that is asked."""
    if sum([good.numel() for good in goods]) < layers:
        seen.add_(samples)
        return
    every = goods[0] if len(goods) == 1 else torch.cat([good.view(-1).to(seen.device) for good in goods])
    if isinstance(samples, Tensor):
        seen.add_(samples * every.any())
    else:
        seen.add_(every.any(), alpha=samples)


def empty(every: Sequence[LayerSums]) -> None:
    """Set what is in layers' sums to zero, in place."""
    set_to_zero([total for sums in every for total in (*sums.sums, sums.counts)])
    for sums in every:
        sums.batches = sums.decays = 0


def _device(layer: Layer) -> torch.device:
    """Where a layer's sums are counted."""
    return next(iter(layer.parameters.values())).device


def _decayed(total: Tensor, beta: float) -> Tensor:
    return total if beta == 1.0 else total.mul_(beta)
