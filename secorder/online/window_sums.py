"""What windows of training bring, each by itself; put together, one after the other, where both are asked for.

Each takes out what has come since the one before. A thousand small layers are a few thousand small tensors, and to
make, divide and add as many takes longer than a step of training, so that those of small layers are taken out as
parts of one vector: it is copied and added in one operation, and the sums themselves go on from zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.several import add_each
from .norm_sums import NormSums, together_norms
from .sums import LayerSums

#: Elements of the largest sum of a layer that is small.
SMALL = 2**14

#: Small layers that are worth a vector.
MANY = 16


class Small(NamedTuple):
    """What the sums of small layers are parts of."""

    names: tuple[str, ...]  #: of the layers
    sums: Tensor  #: 1-D, in their order
    counts: Tensor  #: a row a layer

    def layers(self, like: Mapping[str, LayerSums]) -> dict[str, LayerSums]:
        """Each layer's part, of sums of the same sizes as others'."""
        every = [like[name] for name in self.names]
        parts = iter(self.sums.split([total.numel() for sums in every for total in sums.sums]))
        return {
            name: LayerSums([next(parts) for _ in sums.sums], row, sums.batches, sums.decays)
            for name, sums, row in zip(self.names, every, self.counts.unbind(), strict=True)
        }


def small(every: Mapping[str, LayerSums]) -> Small | None:
    """A copy of what small layers have, if there are many, and all of one dtype in one place."""
    chosen = {n: sums for n, sums in every.items() if sums.sums and all(t.numel() <= SMALL for t in sums.sums)}
    totals = [total for sums in chosen.values() for total in sums.sums]
    counts = [sums.counts for sums in chosen.values()]
    if len(chosen) < MANY or len({(t.dtype, t.device) for t in totals}) > 1 or len({c.device for c in counts}) > 1:
        return None
    return Small(tuple(chosen), torch.cat(totals), torch.stack(counts))


@dataclass
class WindowSums:
    """What one window of training has brought."""

    sums: dict[str, LayerSums]  #: by layer
    seen: Tensor  #: samples of all batches that count, float64
    elsewhere: float  #: samples that other ranks had seen when they were synchronised
    batches: int  #: recorded
    norms: NormSums  #: what the norms of per-sample gradients tell
    small: Small | None = None  #: what the sums of small layers are parts of, if they are


def together(earlier: LayerSums, later: LayerSums, decay: float | None) -> LayerSums:
    """What two windows have brought of a layer, one after the other; where the later one is."""
    kept = 1.0 if decay is None else decay**later.decays
    sums = [torch.add(new, old.to(new), alpha=kept) for old, new in zip(earlier.sums, later.sums, strict=True)]
    counts = earlier.counts.to(later.counts) * later.counts.new_tensor([1.0, kept, 1.0]) + later.counts
    return LayerSums(sums, counts, earlier.batches + later.batches, earlier.decays + later.decays)


def joined(earlier: WindowSums, later: WindowSums, decay: float | None) -> WindowSums:
    """What two windows have brought, one after the other."""
    return WindowSums(
        {name: together(earlier.sums[name], sums, decay) for name, sums in later.sums.items()},
        earlier.seen.to(later.seen) + later.seen,
        earlier.elsewhere + later.elsewhere,
        earlier.batches + later.batches,
        together_norms(earlier.norms, later.norms),
    )


def put_aside(window: WindowSums, *, copy: bool = False) -> WindowSums:
    """The same in the host's memory: an accelerator's is for what is added to.

    With ``copy``, of what is in the host's memory already, too, to be added to.
    """
    vectors = window.small or small(window.sums)
    if vectors is not None:
        vectors = vectors._replace(sums=vectors.sums.to("cpu", copy=copy), counts=vectors.counts.to("cpu", copy=copy))
    parts = {} if vectors is None else vectors.layers(window.sums)
    sums = {name: parts.get(name) or own.to("cpu", copy=copy) for name, own in window.sums.items()}
    norms = window.norms.to("cpu", copy=copy)
    return WindowSums(sums, window.seen.to("cpu", copy=copy), window.elsewhere, window.batches, norms, vectors)


def add_behind(earlier: WindowSums, later: WindowSums, decay: float | None) -> WindowSums:
    """What two windows have brought, one after the other; the earlier one's sums are added to."""
    pairs = [(earlier.sums[name], sums) for name, sums in later.sums.items()]
    for old, new in pairs:
        if decay is not None:
            old.counts[1].mul_(decay**new.decays)
            for total in old.sums:
                total.mul_(decay**new.decays)
        old.batches += new.batches
        old.decays += new.decays
    added = decay is None and _add_vectors(earlier.small, later.small)
    names = set(later.small.names) if added and later.small is not None else ()
    pairs = [(earlier.sums[name], sums) for name, sums in later.sums.items() if name not in names]
    totals = [pair for old, new in pairs for pair in zip(old.sums, new.sums, strict=True)]
    if totals:  # else norms alone are accumulated, and nothing is counted here
        totals += [(old.counts, new.counts) for old, new in pairs]
        add_each([old for old, _ in totals], [new.to(old) for old, new in totals])
    rest = joined(replace(earlier, sums={}), put_aside(replace(later, sums={}, small=None)), decay)
    return replace(rest, sums=earlier.sums, small=earlier.small)


def _add_vectors(earlier: Small | None, later: Small | None) -> bool:
    """Whether the sums of small layers could be added as one."""
    if earlier is None or later is None or earlier.names != later.names:
        return False
    earlier.sums.add_(later.sums.to(earlier.sums))
    earlier.counts.add_(later.counts.to(earlier.counts))
    return True
