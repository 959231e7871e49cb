"""What the norms of per-sample gradients tell, added up over steps: of all layers one table, a few numbers a layer.

For each layer the squared norms ‖∂ℓ_n/∂θ‖² of a batch are N numbers, and with the batch gradient's own norm they are
all that the trace of the Fisher, its standard error and the gradient noise scale need (see :mod:`.trace` and
:mod:`.noise`). A column of the table is a linear function of what a batch brings, so that a batch is one small product
of matrices for all layers together. Nothing is read on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._torch.collectives import has_ranks
from .._torch.compile import never_compiled
from .._torch.engine import accumulate_node, accumulates_untouched, will_accumulate
from .._torch.norms import norms_of
from .._torch.sparse import gives_sparse_gradients
from ..errors import NonFiniteError
from ..layers.norms import squared_norm_of_sum, squared_norms
from ..layers.per_sample import PerSample
from ..layers.rank_one import RankOne
from ..layers.selection import Layer
from ..parallel.ranks import Ranks
from .constants import Constants
from .finite import finite
from .record import Backward, ForwardRecord

if TYPE_CHECKING:
    from .fisher import OnlineFisher

__all__ = [
    "NormSums",
    "Row",
    "add_norms",
    "keep_norms",
    "read_squares",
    "take_norms",
    "takes_norms",
    "together_norms",
    "watch_squares",
]


class Row(NamedTuple):
    """What is summed up of a layer; sums are weighted: 1 a sample, or as a moving average weighs.

    Attributes:
        samples: how many.
        batches: that count.
        kept: what the moving average has kept of what was before.
        weight: of the samples.
        squares: Σ ‖∂ℓ_n‖².
        fourth: Σ ‖∂ℓ_n‖⁴.
        weight_squares: Σ of squares of the weights.
        noise_weight: of the samples of the batches that the next two are of.
        signal: Σ of the batches' |G|², the expected gradient's squared norm.
        noise: Σ of the batches' tr Σ, the trace of the samples' covariance.
    """

    samples: float
    batches: float
    kept: float
    weight: float
    squares: float
    fourth: float
    weight_squares: float
    noise_weight: float
    signal: float
    noise: float


COLUMNS = {name: index for index, name in enumerate(Row.__annotations__)}
#: To which power a moving average's factor is what a column keeps.
POWERS = [0, 0, 1, 1, 1, 1, 2, 1, 1, 1]


@dataclass
class NormSums:
    """The table.

    Attributes:
        table: a row a layer, a column for each field of :class:`Row`, float64.
        added: how many batches were added.
        constants: numbers that each batch needs again.
    """

    table: Tensor
    added: int = 0
    constants: Constants = field(default_factory=Constants, repr=False)
    _linear: "dict[_Terms, Tensor]" = field(default_factory=dict, repr=False)

    @classmethod
    def empty(cls, layers: int, device: torch.device) -> "NormSums":
        """Of layers that have seen nothing."""
        table = torch.zeros(layers, len(COLUMNS), dtype=torch.float64, device=device)
        table[:, COLUMNS["kept"]] = 1.0
        return cls(table)

    def to(self, device: torch.device | str, *, copy: bool = False) -> "NormSums":
        """The same on another device."""
        return NormSums(self.table.to(device, copy=copy), self.added)

    def rows(self) -> list[Row]:
        """As the host reads them."""
        return [Row(*row) for row in self.table.tolist()]

    def add(self, places: Sequence[int], increments: Tensor, decay: float | None) -> None:
        """Add to these layers' rows; a moving average moves on."""
        self.added += 1
        kept = None if decay is None else self.constants.vector([decay**power for power in POWERS], self.table)
        if len(places) == len(self.table):
            self.table = (self.table if kept is None else self.table * kept) + increments
        else:
            index = torch.tensor(places, device=self.table.device)
            before = self.table[index]
            self.table = self.table.index_copy(0, index, (before if kept is None else before * kept) + increments)

    def linear(self, terms: "_Terms") -> Tensor:
        """The matrix that a batch's numbers are multiplied by."""
        if isinstance(terms.count, Tensor):
            return terms.matrix(self.table)
        if terms not in self._linear:
            if len(self._linear) > 8:
                self._linear.clear()
            self._linear[terms] = terms.matrix(self.table)
        return self._linear[terms]


def together_norms(earlier: NormSums, later: NormSums) -> NormSums:
    """What two stretches have brought, one after the other; where the later one is."""
    kept = later.table[:, COLUMNS["kept"], None] ** later.table.new_tensor(POWERS)
    before = earlier.table.to(later.table) * kept
    table = before + later.table
    table[:, COLUMNS["kept"]] = before[:, COLUMNS["kept"]]
    return NormSums(table, earlier.added + later.added)


class _Terms(NamedTuple):
    """What a batch's numbers are weighted by.

    Attributes:
        count: samples of the batch that have a loss.
        weight: of one of them.
        alpha: what squares of g are multiplied by to be squares of ∂ℓ_n/∂z_n.
    """

    count: Any
    weight: float
    alpha: float

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


# ---- the norm of the batch's gradient


def _by_factors(fisher: "OnlineFisher", record: ForwardRecord, layer: Layer) -> bool:
    """Whether the batch gradient's norm is that of the calls' own sum, since the parameters' is not that of the mean.

    Samples weigh differently, a backward may hold several batches, a parameter is frozen or has a sparse gradient, or
    the layer's gradients are formed anyway.
    """
    if (
        layer.rule is None
        or gives_sparse_gradients(layer.module)
        or record.weights is not None
        or fisher.forwards == "separate"
    ):
        return True
    return False in [p.requires_grad for p in layer.parameters.values()]


def watch_squares(fisher: "OnlineFisher", backward: Backward, record: ForwardRecord) -> None:
    """See the norms of the whole gradients, as soon as a backward begins.

    What passes for the gradient of the mean is what the audit looks at: where something else is in it, it tells.
    """
    shared = has_ranks()  # .grad may be all ranks' then
    seen: set[int] = set()
    for layer in fisher.layers:
        if _by_factors(fisher, record, layer):
            continue
        for name, parameter in layer.parameters.items():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not layer.sharded and not shared and accumulates_untouched(parameter):
                backward.unread.append(parameter)
                continue
            leaf = record.parameters(layer)[name]
            saw = partial(_saw, backward, layer, parameter, accumulate_node(leaf))
            backward.on_gradient(leaf, saw, gathered=layer.sharded)


@never_compiled
def _saw(backward: Backward, layer: Layer, parameter: Tensor, node: Any, gradient: Tensor) -> None:
    if backward.ended or not will_accumulate(node):
        return
    key, part = id(parameter), layer.gradient(parameter, gradient)
    if key in backward.norms or part is None or part.layout is not torch.strided:
        backward.norms[key] = None  # it comes in parts, as reentrant checkpoints bring it
    else:
        (backward.norms[key],) = norms_of([part])


def read_squares(backward: Backward) -> None:
    """The norms of gradients that were not there when the backward began, now that it has ended."""
    parameters = [p for p in backward.unread if p.grad is not None and p.grad.layout is torch.strided]
    backward.unread.clear()
    if parameters and backward.alone:
        gradients = [p.grad.detach() for p in parameters if p.grad is not None]
        backward.norms.update(zip([id(p) for p in parameters], norms_of(gradients), strict=True))


# ---- what a record brings


def takes_norms(record: ForwardRecord) -> bool:
    """Whether the norms of a record's per-sample gradients are taken."""
    return record.backward is not None and record.backward.takes_norms


def take_norms(
    fisher: "OnlineFisher", record: ForwardRecord, layer: Layer, parts_of: Sequence[Sequence[PerSample]]
) -> None:
    """Keep the squared norms of a layer's per-sample gradients until the backward has ended."""
    sizes = layer.sizes()
    if layer.split:  # of what several ranks have, one counts it
        own = _answered_for(layer)
        parts_of, sizes = [parts_of[i] for i in own], [sizes[i] for i in own]
    table = fisher.norms.table
    low = fisher.low(record, layer)
    found = squared_norms(parts_of, sizes, low=low) if sizes else table.new_zeros(record.num_samples)
    record.norms[layer.name] = found
    if _by_factors(fisher, record, layer):
        record.squares[layer.name] = squared_norm_of_sum(parts_of, sizes) if sizes else table.new_zeros(())


def _answered_for(layer: Layer) -> list[int]:
    """The numbers of a layer's parameters whose norms this rank adds to those of the ranks with other parts."""
    parameters = layer.parameters.values()
    return [i for i, p in enumerate(parameters) if layer.spread is None or layer.spread.answers_for(p)]


def keep_norms(fisher: "OnlineFisher", record: ForwardRecord, layers: Sequence[RankOne], norms: Tensor) -> None:
    """Keep the squared norms of layers' per-sample gradients, shape ``(layers, N)``, until the backward has ended."""
    for one, own in zip(layers, norms.unbind(), strict=True):
        record.norms[one.layer.name] = own
        if _by_factors(fisher, record, one.layer):
            sizes = [p.numel() for p in one.layer.parameters.values()]
            parts = [[part] for part in one.gradients.values()]
            record.squares[one.layer.name] = squared_norm_of_sum(parts, sizes)


def add_norms(fisher: "OnlineFisher", record: ForwardRecord, zeros: Sequence[str]) -> Tensor | None:
    """Add what a record's layers have brought; whether each of all layers was finite, where all were added.

    Args:
        fisher: that it is added to.
        record: of one forward whose backward has ended, or the first of those whose row n is one sample.
        zeros: layers that the loss does not depend on.
    """
    here = [x.name in record.norms or x.name in zeros for x in fisher.layers]
    if fisher.ranks is not None:  # what one rank has not, is left out by all
        here = [not missing for missing in fisher.ranks.largest([not x for x in here])]
    places = [i for i, present in enumerate(here) if present]
    if not places:
        return None
    sums, layers = fisher.norms, [fisher.layers[i] for i in places]
    none = sums.table.new_zeros(record.num_samples) if zeros else None
    squares = _stack([record.norms.get(layer.name, none) for layer in layers], sums.table)  # type: ignore[misc]
    totals, told = _totals(fisher, record, layers, sums.table)
    if fisher.ranks is not None:
        squares, totals = _of_all_parts(fisher.ranks, layers, squares, totals)
    own = squares.sum(1)
    ones = sums.constants.vector([1.0] * len(layers), sums.table)
    told_of, told_own = (ones, own) if all(told) else (own.new_tensor(told), own * own.new_tensor(told))
    numbers = torch.stack([ones, own, torch.linalg.vecdot(squares, squares), told_of, told_own, totals])
    everywhere = fisher.of_all(record)
    weight = 1.0 if fisher.decay is None else (1 - fisher.decay) / everywhere
    count = record.num_samples if record.counted is None else record.counted
    linear = sums.linear(_Terms(count, weight, fisher.factor(record)))
    fine = finite(numbers.sum(0))  # of what is nowhere negative
    kept = fisher.on_nonfinite == "keep"
    increments = torch.where(fine[:, None], numbers.t() @ linear, _not_finite(linear) if kept else 0.0)
    good = None if kept else fine
    if fisher.ranks is not None:
        increments, good = _of_all_ranks(fisher.ranks, increments, good)
    if fisher.on_nonfinite == "raise" and good is not None and not bool(good.all()):
        name = layers[int((~good).nonzero()[0])].name
        raise NonFiniteError(
            f"the gradient at layer {name!r} holds nan or inf: lower the learning rate or the loss scale, or "
            'pass on_nonfinite="skip" to leave such batches out.'
        )
    sums.add(places, increments, fisher.decay)
    return good if len(places) == len(fisher.layers) else None


def _not_finite(linear: Tensor) -> Tensor:
    """What a batch adds that is counted although its norms are no numbers."""
    row = linear[0].clone()
    row[[COLUMNS[name] for name in ("squares", "fourth", "signal", "noise")]] = torch.nan
    return row


def _of_all_parts(ranks: Ranks, layers: Sequence[Layer], squares: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """‖g_n‖² of each layer and sample, and ‖Σ_n g_n‖², of layers that lie in parts over the ranks."""
    split = [i for i, layer in enumerate(layers) if layer.split]
    if not split:
        return squares, totals
    found = ranks.of_all_parts(torch.cat([squares[split], totals[split, None]], 1))
    index = torch.tensor(split, device=squares.device)
    return squares.index_copy(0, index, found[:, :-1]), totals.index_copy(0, index, found[:, -1])


def _of_all_ranks(ranks: Ranks, increments: Tensor, good: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The sum over the ranks that have samples of their own; all of them leave a layer's batch out, or none."""
    bad = torch.zeros_like(increments[:, :1]) if good is None else (~good)[:, None].to(increments.dtype)
    batches = COLUMNS["batches"]
    found = ranks.of_all_samples(torch.cat([increments, bad], 1))
    increments, bad = found[:, :-1], found[:, -1:]
    increments[:, batches] = (bad[:, 0] == 0).to(increments.dtype)
    return torch.where(bad == 0, increments, 0.0), None if good is None else bad[:, 0] == 0


def _totals(
    fisher: "OnlineFisher", record: ForwardRecord, layers: Sequence[Layer], like: Tensor
) -> tuple[Tensor, list[bool]]:
    """‖Σ_n g_n‖² of each layer, and whether it is known; zero where it is not."""
    backward = record.backward
    assert backward is not None
    alone = fisher.forwards == "joined" or len(backward.records) == 1
    rows, told = [], []
    width = max(len(layer.parameters) for layer in layers)
    zero = like.new_zeros(())
    for layer in layers:
        known = True
        if layer.name in record.squares:
            norms = [record.squares[layer.name].sqrt()]
        elif layer.name not in record.norms:
            norms = [zero]  # the loss does not depend on it
        else:
            parts = [backward.norms.get(id(p)) for p in layer.parameters.values()]
            norms = [norm for norm in parts if norm is not None]
            known = alone and fisher.penalty is None and len(norms) == len(parts)
            if layer.split and known:
                norms = [norms[i] for i in _answered_for(layer)]
        told.append(known)
        norms = norms if known else []
        rows += [*norms, *[zero] * (width - len(norms))]
    return _stack(rows, like).view(len(layers), width).square().sum(1), told


def _stack(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Of several dtypes and devices, in float64."""
    if len({(t.dtype, t.device) for t in tensors}) == 1:
        return torch.stack(list(tensors)).to(like)
    return torch.stack([t.to(like) for t in tensors])
