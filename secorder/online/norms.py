"""What the norms of per-sample gradients tell, taken of each batch and handed to the table of norms.

For each layer the squared norms ‖∂ℓ_n/∂θ‖² of a batch are N numbers, and with the batch gradient's own norm they are
all that the trace of the Fisher, its standard error and the gradient noise scale need (see :mod:`.trace` and
:mod:`.noise`). Nothing is read on the host.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .._torch.compile import never_compiled
from .._torch.engine import accumulate_node, will_accumulate
from .._torch.several import norms_of
from ..layers.norms import squared_norm_of_sum, squared_norms
from ..layers.per_sample import PerSample
from ..layers.rank_one import FactorNorms, RankOne
from ..layers.selection import Layer
from ..parallel.ranks import Ranks
from .finite import not_finite
from .fisher import OnlineFisher
from .norm_sums import COLUMNS, Batch, Kind, Terms
from .record import Backward, ForwardRecord
from .schedule import now_and_then

#: Where a diagonal is accumulated, norms of per-sample gradients are taken of the first batch and of one in so many.
ONE_IN = 32

_REQUIRES_GRAD = attrgetter("requires_grad")


def norms_due(fisher: OnlineFisher) -> bool:
    """Whether the norms of a backward's per-sample gradients are taken: of all, or of some where it costs more."""
    if fisher.penalty is not None:
        return False
    if fisher.accumulate == "trace" or not fisher.norms.added:
        return True
    return now_and_then(fisher.num_batches, ONE_IN)


# ---- the norm of the batch's gradient


def watch_squares(fisher: OnlineFisher, backward: Backward, record: ForwardRecord, fresh: set[int]) -> None:
    """See the norms of the whole gradients, as soon as a backward begins; ``fresh`` parameters have no gradient yet.

    What passes for the gradient of the mean is what the audit looks at: where something else is in it, it tells.
    Of some layers the norm is that of the calls' own sum, since the parameters' gradient is not that of the mean:
    samples weigh differently, a backward may hold several batches, a parameter is frozen, is not used or has a sparse
    gradient, or the layer's gradients are formed anyway.
    """
    backward.takes_norms = True
    every = record.weights is not None or fisher.forwards == "separate"
    measured = (*record.attribution.layers, *record.fallback)
    formed = {x.name for x in measured if x.rule is None and not x.by_operations}
    hooked: set[int] = set()  # tied layers hold one
    for layer in fisher.layers:
        parameters = layer.parameters.values()
        if every or layer.name in formed or layer.sparse or not all(map(_REQUIRES_GRAD, parameters)):
            backward.by_factors.add(layer.name)
            continue
        if fresh.issuperset(map(id, parameters)):
            backward.unread += parameters
            continue
        for name, parameter in layer.parameters.items():
            if id(parameter) in hooked:
                continue
            hooked.add(id(parameter))
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
    grads = {id(p): g for p in backward.unread if (g := p.grad) is not None and g.layout is torch.strided}
    backward.unread.clear()
    norms = norms_of(list(grads.values())) if grads and backward.alone else []
    if backward.alone:  # still: what was read is this pass's
        backward.norms.update(zip(grads, norms, strict=True))


# ---- what a record brings


def takes_norms(record: ForwardRecord) -> bool:
    """Whether the norms of a record's per-sample gradients are taken."""
    return record.backward is not None and record.backward.takes_norms


def take_norms(
    fisher: OnlineFisher,
    record: ForwardRecord,
    layer: Layer,
    parts_of: Sequence[Sequence[PerSample]],
    known: str | None = None,
) -> None:
    """Keep the squared norms of a layer's per-sample gradients until the backward has ended; perhaps another's."""
    sizes = layer.sizes()
    if layer.split:  # of what several ranks have, one counts it
        here = _answered_for(layer)
        parts_of, sizes = [parts_of[i] for i in here], [sizes[i] for i in here]
    none = torch.zeros(record.num_samples, dtype=torch.float64, device=fisher.norms.device) if not sizes else None
    low = fisher.low(record, layer)
    own = record.layers[layer.name]
    norms = record.layers[known].norms if known else none
    own.norms = squared_norms(parts_of, sizes, low=low) if norms is None else norms
    unused = not all(parts_of)  # which is not known from a gradient that is not there
    if record.backward is not None and (unused or layer.name in record.backward.by_factors):
        own.squares = squared_norm_of_sum(parts_of, sizes) if none is None else none.new_zeros(())


def bring_zeros(fisher: OnlineFisher, record: ForwardRecord, name: str) -> None:
    """The loss does not depend on a layer."""
    own = record.layers[name]
    if own.norms is None:
        own.norms = torch.zeros(record.num_samples, dtype=torch.float64, device=fisher.norms.device)
        own.squares = own.norms.new_zeros(())


def _answered_for(layer: Layer) -> list[int]:
    """The numbers of a layer's parameters whose norms this rank adds to those of the ranks with other parts."""
    parameters = layer.parameters.values()
    return [i for i, p in enumerate(parameters) if layer.spread is None or layer.spread.answers_for(p)]


def keep_norms(record: ForwardRecord, one: RankOne) -> FactorNorms:
    """Keep what the norms of a layer's per-sample gradients are products of, until the backward has ended."""
    own, norms = record.layers[one.layer.name], one.norms()
    own.norms = norms
    if record.backward is not None and one.layer.name in record.backward.by_factors:
        own.squares = squared_norm_of_sum([[part] for part in one.gradients.values()], one.layer.sizes())
    return norms


def add_norms(fisher: OnlineFisher, record: ForwardRecord, seen: Tensor | None) -> bool:
    """Add what a record's layers have brought; whether its samples were counted, or will be.

    They are counted in ``seen``, unless no layer was finite or they are counted elsewhere.
    """
    norms: list[Any] = [record.layers[layer.name].norms for layer in fisher.layers]
    here = [own is not None for own in norms]
    if fisher.ranks is not None:  # what one rank has not, is left out by all
        here = [not missing for missing in fisher.ranks.largest([not x for x in here])]
    places, layers = tuple(range(len(norms))), fisher.layers
    if False in here:
        places = tuple(i for i in places if here[i])
        layers, norms = [layers[i] for i in places], [norms[i] for i in places]
        if not places:
            return False
    sums = fisher.norms
    weight = 1.0 if fisher.decay is None else (1 - fisher.decay) / fisher.of_all(record)
    count = record.num_samples if record.counted is None else record.counted
    totals, known = _totals(fisher, record, layers)
    terms, keep = Terms(count, weight, fisher.factor(record)), fisher.on_nonfinite == "keep"
    batch, kind = Batch(norms, totals), Kind(places, known, record.num_samples, terms, fisher.decay, keep)
    if seen is not None and fisher.ranks is None and fisher.on_nonfinite != "raise" and record.counted is None:
        sums.wait(batch, kind, seen)
        return True
    ranks = fisher.ranks
    (increments,), (fine,) = sums.increments(
        [batch], kind, None if ranks is None else lambda squares, totals: _of_all_parts(ranks, layers, squares, totals)
    )
    good = None if keep else fine
    if ranks is not None:
        increments, good = _of_all_ranks(ranks, increments, good)
    if fisher.on_nonfinite == "raise" and good is not None and not bool(good.all()):
        raise not_finite(layers[int((~good).nonzero()[0])].name)
    sums.add(places, increments, fisher.decay)
    if seen is None or good is None or len(places) < len(fisher.layers):
        return False
    seen.add_(fisher.count_of(record) * good.any().to(seen))
    return True


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
    fisher: OnlineFisher, record: ForwardRecord, layers: Sequence[Layer]
) -> tuple[list[Tensor], tuple[bool, ...]]:
    """Of each layer numbers whose squares' sum is ‖Σ_n g_n‖², and whether it is known; zeros where it is not."""
    backward = record.backward
    assert backward is not None
    whole = fisher.penalty is None and (fisher.forwards == "joined" or len(backward.records) == 1)
    rows: list[list[Tensor]] = []
    every_known = []
    for layer in layers:
        squares, known = record.layers[layer.name].squares, True
        if squares is not None:
            row = [squares.sqrt()]
        else:
            keys = list(map(id, layer.parameters.values()))
            keys = [keys[i] for i in _answered_for(layer)] if layer.split else keys
            row = [norm for norm in map(backward.norms.get, keys) if norm is not None]
            known = whole and len(row) == len(keys)
        every_known.append(known)
        rows.append(row if known else [])
    widths = set(map(len, rows))
    if len(widths) > 1 or 0 in widths:
        width = max(1, *widths)
        none = torch.zeros((), dtype=torch.float64, device=fisher.norms.device)
        zero = next((row[0] for row in rows if row), none).new_zeros(())
        rows = [[*row, *[zero] * (width - len(row))] for row in rows]
    return list(chain.from_iterable(rows)), tuple(every_known)
