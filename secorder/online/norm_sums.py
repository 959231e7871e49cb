"""The table of norms: what is summed up over batches of each layer, a few numbers a layer.

A column of the table is a linear function of what a batch brings, so that a batch is one small product of matrices for
all layers together. Batches may wait to be added, several at once; whoever asks has all of them added before. Nothing
is read on the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch.surroundings import lasting
from ..layers.rank_one import FactorNorms
from .constants import Constants
from .finite import finite
from .sums import ADDING

_KIND = attrgetter("dtype", "device")

#: Batches that wait at most, and elements of their norms.
MOST, MOST_ELEMENTS = 64, 1 << 16


class Row(NamedTuple):
    """What is summed up of a layer; sums are weighted: 1 a sample, or as a moving average weighs."""

    samples: float  #: how many
    batches: float  #: that count
    kept: float  #: what the moving average has kept of what was before
    weight: float  #: of the samples
    squares: float  #: Σ ‖∂ℓ_n‖²
    fourth: float  #: Σ ‖∂ℓ_n‖⁴
    weight_squares: float  #: Σ of squares of the weights
    noise_weight: float  #: of the samples of the batches that the next two are of
    signal: float  #: Σ of the batches' |G|², the expected gradient's squared norm
    noise: float  #: Σ of the batches' tr Σ, the trace of the samples' covariance


COLUMNS = {name: index for index, name in enumerate(Row.__annotations__)}
#: To which power a moving average's factor is what a column keeps.
POWERS = [0, 0, 1, 1, 1, 1, 2, 1, 1, 1]


class Terms(NamedTuple):
    """What a batch's numbers are weighted by."""

    count: Any  #: samples of the batch that have a loss
    weight: float  #: of one of them
    alpha: float  #: what squares of g are multiplied by to be squares of ∂ℓ_n/∂z_n

    def matrix(self, like: Tensor) -> Tensor:
        """From (1, Σ‖g_n‖², Σ‖g_n‖⁴, 1, Σ‖g_n‖², ‖Σ g_n‖²) to the columns; the last three where noise is told."""
        count, w, alpha = torch.as_tensor(self.count, dtype=like.dtype, device=like.device), self.weight, self.alpha
        pairs = count - 1
        several = (pairs > 0).to(like.dtype)
        pairs = pairs.clamp(min=1.0)
        found = like.new_zeros(6, len(COLUMNS))
        entries: dict[tuple[int, str], Tensor | float] = {
            (0, "samples"): count,
            (0, "batches"): 1.0,
            (0, "weight"): w * count,
            (1, "squares"): w * alpha,
            (2, "fourth"): w * alpha**2,
            (0, "weight_squares"): w**2 * count,
            (3, "noise_weight"): w * count * several,
            # |G|² = (N B − S) / (N − 1) and tr Σ = (S − B) N / (N − 1), times N: S = Σ‖∂ℓ_n‖² / N, B = ‖Σ ∂ℓ_n‖² / N²
            (4, "signal"): -w * alpha / pairs * several,
            (5, "signal"): w * alpha / pairs * several,
            (4, "noise"): w * alpha * count / pairs * several,
            (5, "noise"): -w * alpha / pairs * several,
        }
        for (row, column), value in entries.items():
            found[row, COLUMNS[column]].copy_(torch.as_tensor(value))
        return found


class Kind(NamedTuple):
    """What batches that are added at once have in common."""

    places: tuple[int, ...]  #: the numbers of the layers
    known: tuple[bool, ...]  #: of each, whether the norm of its batch gradient is known
    samples: int  #: of the batch, those without a loss among them
    terms: Terms  #: what their numbers are weighted by
    decay: float | None  #: of a moving average
    kept: bool  #: whether a batch that is not finite is counted all the same


class Batch(NamedTuple):
    """What the norms of one batch are."""

    #: of each layer the squared norms of its per-sample gradients, shape ``(samples,)``, or what they are products of
    norms: Sequence[Tensor | FactorNorms]
    #: of each layer in turn, equally many numbers: the sum of their squares is its batch gradient's squared norm
    totals: Sequence[Tensor]


@dataclass
class NormSums:
    """The table."""

    _table: Tensor
    added: int = 0  #: how many batches were added
    _constants: Constants = field(default_factory=Constants, repr=False)
    _linear: dict[Terms, Tensor] = field(default_factory=dict, repr=False)
    _waiting: list[Batch] = field(default_factory=list, repr=False)
    _kind: tuple[Kind, Tensor] | None = None  # of those that wait, and what their samples are counted in

    @classmethod
    def empty(cls, layers: int, device: torch.device) -> "NormSums":
        """Of layers that have seen nothing."""
        table = torch.zeros(layers, len(COLUMNS), dtype=torch.float64, device=device)
        table[:, COLUMNS["kept"]] = 1.0
        return cls(table)

    @property
    def table(self) -> Tensor:
        """A row a layer, a column for each field of :class:`Row`, float64."""
        self.settle()
        return self._table

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self._table.device

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return self.__dict__.copy()

    def to(self, device: torch.device | str, *, copy: bool = False) -> "NormSums":
        """The same on another device."""
        return NormSums(self.table.to(device, copy=copy), self.added)

    def rows(self) -> list[Row]:
        """As the host reads them."""
        return [Row(*row) for row in self.table.tolist()]

    def wait(self, batch: Batch, kind: Kind, seen: Tensor) -> None:
        """Add a batch, of which nothing is overwritten any more, now or later.

        Its samples are counted in ``seen``, unless no layer was finite.
        """
        alike = self._kind is not None and self._kind[0] == kind and self._kind[1] is seen
        if self._waiting and not (alike and len(self._waiting[0].totals) == len(batch.totals)):
            self.settle()
        self.added += 1
        self._waiting.append(batch)
        self._kind = kind, seen
        if len(self._waiting) >= min(MOST, MOST_ELEMENTS // (1 + kind.samples * len(kind.places))):
            self.settle()

    def settle(self) -> None:
        """Add the batches that wait."""
        if self._waiting:
            with ADDING, lasting():
                if self._waiting and self._kind is not None:
                    self._add_all(*self._kind)

    def _add_all(self, kind: Kind, seen: Tensor) -> None:
        increments, fine = self.increments(self._waiting, kind)
        table = self._table
        for one in increments.sum(0, keepdim=True) if kind.decay is None else increments.unbind():
            table = self._after(table, kind.places, one, kind.decay)
        if len(kind.places) < len(table) or kind.kept:
            count = torch.full_like(seen, kind.terms.count * len(self._waiting))
        else:
            count = kind.terms.count * fine.any(1).sum()
        self._table, self._waiting = table, []  # where what is before is broken off, nothing is lost
        seen.add_(count)

    def increments(
        self,
        batches: Sequence[Batch],
        kind: Kind,
        everywhere: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What batches add to the rows, shape ``(batches, layers, columns)``, and of each layer whether it was finite.

        Of one batch, ``everywhere`` makes of the squared norms of this rank's parts those of whole layers.
        """
        like, shape = self._table, (len(batches), len(kind.places), -1)
        squares = torch.stack([_squares(own, like) for own in zip(*[batch.norms for batch in batches], strict=True)], 1)
        totals = _stack([x for batch in batches for x in batch.totals], like).view(shape).square().sum(2)
        if everywhere is not None:
            squares, totals = (x[None] for x in everywhere(squares[0], totals[0]))
        own = squares.sum(2)
        ones, known = (
            self._constants.vector(numbers, like).expand_as(own) for numbers in ([1.0] * len(kind.known), kind.known)
        )
        numbers = torch.stack([ones, own, torch.linalg.vecdot(squares, squares), known, known * own, totals], 2)
        fine = finite(numbers.sum(2))  # of what is nowhere negative
        linear = self._matrix(kind.terms)
        increments = torch.where(fine[:, :, None], numbers @ linear, _not_finite(linear) if kind.kept else 0.0)
        return increments, fine

    def add(self, places: Sequence[int], increments: Tensor, decay: float | None) -> None:
        """Add to these layers' rows; a moving average moves on."""
        self.added += 1
        self._table = self._after(self.table, places, increments, decay)

    def _after(self, table: Tensor, places: Sequence[int], increments: Tensor, decay: float | None) -> Tensor:
        kept = None if decay is None else self._constants.vector([decay**power for power in POWERS], table)
        if len(places) == len(table):
            return (table if kept is None else table * kept) + increments
        index = torch.tensor(places, device=table.device)
        before = table[index]
        return table.index_copy(0, index, (before if kept is None else before * kept) + increments)

    def _matrix(self, terms: Terms) -> Tensor:
        """The matrix that a batch's numbers are multiplied by."""
        if isinstance(terms.count, Tensor):
            return terms.matrix(self._table)
        if terms not in self._linear:
            if len(self._linear) > 8:
                self._linear.clear()
            self._linear[terms] = terms.matrix(self._table)
        return self._linear[terms]


def together_norms(earlier: NormSums, later: NormSums) -> NormSums:
    """What two windows have brought, one after the other; where the later one is."""
    kept = later.table[:, COLUMNS["kept"], None] ** later.table.new_tensor(POWERS)
    before = earlier.table.to(later.table) * kept
    table = before + later.table
    table[:, COLUMNS["kept"]] = before[:, COLUMNS["kept"]]
    return NormSums(table, earlier.added + later.added)


def _not_finite(linear: Tensor) -> Tensor:
    """What a batch adds that is counted although its norms are no numbers."""
    row = linear[0].clone()
    row[[COLUMNS[name] for name in ("squares", "fourth", "signal", "noise")]] = torch.nan
    return row


def _squares(norms: Sequence[Tensor | FactorNorms], like: Tensor) -> Tensor:
    """Of a layer's batches the squared norms, shape ``(batches, samples)``, in float64."""
    factors = [x for x in norms if isinstance(x, FactorNorms)]
    if not factors or len(factors) < len(norms):
        return _stack([x.squares() if isinstance(x, FactorNorms) else x for x in norms], like)
    inputs, cotangents, with_bias = zip(*factors, strict=True)
    return FactorNorms(_stack(inputs, like), _stack(cotangents, like), with_bias[0]).squares()


def _stack(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Of several dtypes and devices, in float64."""
    if len(set(map(_KIND, tensors))) == 1:
        return torch.stack(list(tensors)).to(like)
    return torch.stack([t.to(like) for t in tensors])
