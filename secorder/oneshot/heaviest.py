"""Many columns of a root: the heaviest of each sample, and the rest mixed by random signs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._torch.memory import most_bytes
from .hessian.budget import Budget
from .hessian.estimate import Draw, Estimate, average, draws_for
from .roots import Columns, Draws, First, Pairs, Root
from .timing import TRIAL_SECONDS, now, seconds_of, seconds_per_product

#: Of some columns, layer by layer what is asked for: Σ_k contract(u_k, v_k) by parameter, or what is made of that.
Contraction = Callable[[Columns], list[list[Tensor]]]

#: Columns that are taken exactly, at most, or as many as there are draws at least.
MAX_COLUMNS = 256

#: Columns, and draws, that tell how long all of them take.
PILOT_COLUMNS = 16

#: And draws at least, however long one takes; and columns at once whose memory tells of that of more.
LEAST_DRAWS, METERED_COLUMNS = 2, 128

#: Draws from which on half of them may be columns: two draws tell of their error.
MIN_DRAWS = 4


@dataclass(frozen=True, eq=False)
class Heaviest:
    """Some columns of a root, of each sample its own."""

    root: Root  #: of which
    order: Tensor  #: shape ``(N, J)``: which columns

    @property
    def num_columns(self) -> int:
        return self.order.shape[1]

    def columns(self, ids: range) -> Pairs:
        chosen = self.order.T[ids.start : ids.stop]
        coefficients = self.root.like.new_zeros(*chosen.shape, self.root.num_columns)
        pairs = self.root.mixed(coefficients.scatter_(2, chosen[..., None], 1.0))
        if self.root.right is not None or self.root.sign is None:
            return pairs
        return Pairs(pairs.u, None, self.root.sign.to(pairs.u.dtype).gather(1, chosen.T).T)

    def mixture(self, generator: torch.Generator) -> Tensor:
        return self.columns(range(1)).u if self.num_columns == 1 else self.root.mixture(generator)


def heaviest(root: Root, share: float) -> Heaviest:
    """As many columns, by falling weight, as leave at most this share (0 to 1) of the whole weight to the rest.

    A column's weight is its part of the trace of the loss's Hessian in the outputs, ``‖s_k‖²``, which the root must
    know. Each sample has its own order, and all of them as many columns.
    """
    assert root.weights is not None
    weights, order = root.weights().abs().double().sort(dim=1, descending=True)
    left = weights.sum() - weights.sum(0).cumsum(0)  # after one column, after two, …
    enough = (left <= share * weights.sum()).nonzero()
    return Heaviest(root, order[:, : int(enough[0]) + 1 if len(enough) else len(left)])


def by_weight(
    root: Root,
    budget: Budget,
    contract: Contraction,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda _: None,
    seconds: float = math.inf,
) -> list[Estimate]:
    """What is asked for of all columns: that of the heaviest, and of the rest an unbiased estimate, layer by layer.

    ``rtol`` is the rest's share of the trace, and the relative error of each layer that draws go down to; without it
    half of the columns that are taken are the heaviest ones, and half are draws. Exact where draws would be no fewer
    than the columns that are left. With an ``rtol``, draws take no longer than ``seconds``.
    """
    some = _exactly(root, budget)
    count = some.num_columns if some else 0
    draws = budget.num_draws - (0 if budget.rtol is not None else count)
    if count + draws >= root.num_columns:
        values = contract(root)
        advance(root.num_columns)
        return [Estimate(parts) for parts in values]
    exact = contract(some) if some else []
    advance(count)
    draw = _drawing(root, contract, generator, some.order if some else None)
    known = exact or [[torch.zeros_like(v) for v in parts] for parts in contract(Draws.of(root, 1, generator))]
    sizes, flat = [len(parts) for parts in known], _joined(known)
    fewer = budget.fewer(count) if budget.rtol is None else budget
    found = average(draw, [torch.zeros_like(v) for v in flat], fewer, 1, advance, flat, seconds, sizes)
    return found.split(sizes, budget)


@dataclass(frozen=True)
class Forecast:
    """What :func:`by_weight` would take."""

    columns: int = 0  #: columns and draws
    seconds: float = 0.0  #: of all of them
    num_bytes: dict[int, int] = field(default_factory=dict)  #: memory of some at once, by their number
    spent: float = 0.0  #: seconds that it took to tell


def forecast(root: Root, budget: Budget, contract: Contraction, generator: torch.Generator) -> Forecast:
    """What :func:`by_weight` would take for an ``rtol``.

    By a few of the columns, a few draws of the rest, which tell how its error falls, and as many of all of it, which
    tell what the error is relative to.
    """
    start, some = now(), _exactly(root, budget)
    count, without = (some.num_columns, some.order) if some else (0, None)
    if count + budget.num_draws >= root.num_columns:
        seconds, num_bytes = _cost_of_columns(root, contract)
        return Forecast(root.num_columns, seconds, num_bytes, now() - start)
    seconds, num_bytes = _cost_of_columns(some, contract) if some else (0.0, {})
    made: list[list[list[Tensor]]] = []

    def first() -> None:
        made.append(contract(Draws.of(root, 1, generator, without=without)))

    one = seconds_of(lambda: num_bytes.update({1: max(num_bytes.get(1, 0), most_bytes(first))}))
    tried = max(LEAST_DRAWS, min(PILOT_COLUMNS, int(TRIAL_SECONDS / max(one, 1e-9))))
    pilot = replace(budget, num_draws=tried, rtol=None)
    zero, sizes = [torch.zeros_like(v) for v in _joined(made[0])], [len(parts) for parts in made[0]]

    def spread(without: Tensor | None) -> list[Estimate]:
        draw = _drawing(root, contract, generator, without)
        return average(draw, zero, pilot, 1, lambda _: None).split(sizes, pilot)

    rests: list[Estimate] = []
    by_draw = seconds_of(lambda: rests.extend(spread(without))) / tried
    wanted = [draws_for(budget, tried, rest.errors, every) for rest, every in zip(rests, spread(None), strict=True)]
    draws = math.ceil(min(max([budget.num_draws, *wanted]), budget.max_draws))
    return Forecast(count + draws, seconds + draws * by_draw, num_bytes, now() - start)


def _cost_of_columns(columns: Columns, contract: Contraction) -> tuple[float, dict[int, int]]:
    """Seconds of all of them, and the memory of some at once, by their number."""
    few, num_bytes = min(PILOT_COLUMNS, columns.num_columns), dict[int, int]()
    by_column = seconds_per_product(lambda k: contract(First(columns, k)), few, TRIAL_SECONDS)
    most = max(1, min(METERED_COLUMNS, columns.num_columns, int(TRIAL_SECONDS / max(by_column, 1e-9))))
    for count in {min(2, most), most}:
        num_bytes[count] = most_bytes(lambda: contract(First(columns, count)))  # noqa: B023
    return columns.num_columns * by_column, num_bytes


def _drawing(root: Root, contract: Contraction, generator: torch.Generator, without: Tensor | None) -> Draw:
    """Draws of what is asked for, of all layers in one list, beside some columns of each sample."""

    def draw(number: int) -> list[Tensor]:
        made = [_joined(contract(Draws.of(root, 1, generator, without=without))) for _ in range(number)]
        return [torch.stack(parts) for parts in zip(*made, strict=True)]

    return draw


def _exactly(root: Root, budget: Budget) -> Heaviest | None:
    """The columns that are not drawn; None where all are, or none."""
    if root.weights is None or budget.num_draws >= root.num_columns:
        return None
    if budget.rtol is not None:
        found = heaviest(root, budget.rtol)
        return Heaviest(root, found.order[:, : max(MAX_COLUMNS, budget.num_draws)])
    count = budget.num_draws // 2 if budget.num_draws >= MIN_DRAWS else 0
    return Heaviest(root, root.weights().abs().topk(count, dim=1).indices) if count else None


def _joined(by_layer: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [v for parts in by_layer for v in parts]
