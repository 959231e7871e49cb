"""The cost of a Fisher, estimated from its checks and a few of its columns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._torch.memory import most_bytes
from .._torch.pytree import tensors_in
from .._torch.vjp import default_chunk_size
from ..errors import DoubleBackwardError
from ..layers.selection import Layer
from ..results import Strategy
from .fisher import Trial, in_batches
from .fisher_by_loop import trials_of_loop
from .fisher_by_weight import ByWeight
from .fisher_pairs import Asked, Found
from .hessian.budget import Budget
from .hessian.choice import Choice
from .hessian.cost import Cost, layer_cost, result_bytes
from .hessian.facts import Facts
from .measurement import Measurement
from .recording import recorded
from .timing import TRIAL_SECONDS, least_seconds_of, seconds_of

#: Columns of the longer trial, at least.
SOME = 33

#: Seconds from which on a trial is run once: what happens the first time alone takes less.
LONG = 1.0

#: How often a Fisher by batches of one runs all samples together: as they are, in another order, with one twice.
WHOLE_BATCHES = 3


@dataclass(frozen=True)
class _Timed:
    """What trials told."""

    strategies: dict[str, Strategy]  #: of the layers that are served by the whole batch
    columns: int  #: how many there are
    overhead: float  #: seconds without any column
    seconds: float  #: of one column, for all layers together
    num_bytes: dict[int, int]  #: memory of a trial, by its number of columns
    heads: frozenset[str] = frozenset()  #: the layers that take no column

    def bytes_of(self, at_once: int) -> int:
        """Memory with so many columns at once, in proportion to those of the trials."""
        *_, few, some = min(self.num_bytes), *sorted(self.num_bytes)
        least, most = self.num_bytes[few], self.num_bytes[some]
        if some == few or some >= at_once:
            return most
        return most + (at_once - some) * max(0, most - least) // (some - few)


def fisher_cost(task: Measurement, asked: Asked, budget: Budget | None = None) -> Cost:
    """What a Fisher will take, layer by layer; by heaviest columns and draws where a budget has an ``rtol``."""
    timed = _timed(task, asked) if budget is None else _timed_by_weight(task, budget)
    passed, leaves = _sizes(task)
    rest = [layer for layer in task.layers if layer.name not in timed.strategies]
    columns = timed.columns or _num_columns(asked, passed // task.num_samples)
    by_columns = len(timed.strategies.keys() - timed.heads)
    loop, of_loop = _cost_of_loop(task, rest, columns) if rest else (0.0, 0)
    pulled = sum(z for name, z in leaves.items() if name not in timed.heads)
    at_once = default_chunk_size(passed + pulled, next(task.model.parameters()), task.chunk_size)
    num_bytes = max(timed.bytes_of(min(columns, at_once)), of_loop)
    costs = {}
    for layer in task.layers:
        numel = sum(layer.sizes())
        z = leaves.get(layer.name, 0)
        strategy = timed.strategies.get(layer.name, Strategy.LOOP)
        products = columns * (1 if strategy in (Strategy.RULE, Strategy.UNUSED) else task.num_samples)
        head = layer.name in timed.heads
        facts = Facts(
            layer.name,
            numel,
            outputs=z // task.num_samples,
            passed=passed,
            output_elements=max(z, passed),
            parameter_elements=numel + 4 * passed,
        )
        choice = Choice(strategy, 0, 0) if head else Choice(strategy, products, products)
        seconds = loop / len(rest) if layer in rest else 0.0 if head else timed.seconds * columns / by_columns
        found = layer_cost(task, facts, choice, seconds)
        costs[layer.name] = replace(found, num_bytes=min(found.num_bytes, num_bytes))
    return Cost(costs, timed.overhead, num_bytes - max(cost.num_bytes for cost in costs.values()))


def _num_columns(asked: Asked, outputs: int) -> int:
    """Pairs of cotangents, at most."""
    return {"empirical": 1, "type-2": max(outputs, 1), "mc": asked.num_draws}[asked.fisher_type]


def _timed(task: Measurement, asked: Asked) -> _Timed:
    """By a trial of one column, which tells what is done anyway, and one of as many as are made at a time, or so."""
    found: Found = {}
    one = Trial(1)
    num_bytes: dict[int, int] = {}

    def first_time() -> None:
        num_bytes[1] = most_bytes(lambda: found.update(_tried(task, asked, one)))

    start = seconds_of(first_time)
    strategies = {name: info.strategy for name, (_, info) in found.items()}
    if not strategies:
        return _Timed({}, 0, start, 0.0, num_bytes)
    heads = _heads(found)
    first = start if start > LONG else least_seconds_of(lambda: _tried(task, asked, one))
    if one.of <= 1 or len(heads) == len(strategies):
        return _Timed(strategies, one.of, first, 0.0, num_bytes, heads)

    def seconds_by(columns: int) -> float:
        def work() -> Found:
            return _tried(task, asked, Trial(columns))

        num_bytes[columns] = most_bytes(work)
        return max(least_seconds_of(work) - first, 1e-9) / (columns - 1)

    seconds = seconds_by(min(SOME, one.of))
    more = min(one.of, int(TRIAL_SECONDS / (2 * seconds)))
    if more > SOME:  # few may fit a cache that more of them do not
        seconds = seconds_by(more)
    return _Timed(strategies, one.of, max(first - seconds, 0.0), seconds, num_bytes, heads)


def _timed_by_weight(task: Measurement, budget: Budget) -> _Timed:
    """By a few columns and draws."""
    weighted, found, made, asked = ByWeight(budget, forecast=True), Found(), list[int](), Asked("type-2")
    start = seconds_of(lambda: made.append(most_bytes(lambda: found.update(_tried(task, asked, weighted)))))
    if not found:
        return _Timed({}, 0, 0.0, 0.0, {1: made[0]})
    told = weighted.told
    num_bytes = {count: made[0] + own for count, own in told.num_bytes.items()}
    strategies = {name: info.strategy for name, (_, info) in found.items()}
    first = start - told.spent
    if first < LONG:
        first = least_seconds_of(lambda: _tried(task, asked, Trial(1)))
    return _Timed(strategies, told.columns, first, told.seconds / max(1, told.columns), num_bytes, _heads(found))


def _heads(found: Found) -> frozenset[str]:
    """The layers that take no column."""
    return frozenset(name for name, (_, info) in found.items() if "last" in info.checks)


def _tried(task: Measurement, asked: Asked, part: Trial | ByWeight) -> Found:
    try:
        return in_batches(task, asked, part)
    except DoubleBackwardError:  # of the checks; the definition needs one derivative
        return {}


def _sizes(task: Measurement) -> tuple[int, dict[str, int]]:
    """Numbers of the model's output, and by layer of z."""
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        output, _ = task.loss()
        recording.close()
    passed = sum(t.numel() for t in tensors_in(output) if t.requires_grad)
    return passed, {name: sum(math.prod(x.shape) for x in leaves) for name, leaves in recording.leaves.items()}


def _cost_of_loop(task: Measurement, layers: Sequence[Layer], columns: int) -> tuple[float, int]:
    """Seconds and bytes: the model and the loss on the whole batch, for the checks, and on one sample after another."""
    made: list[Any] = []
    kept = most_bytes(lambda: made.append(trials_of_loop(task, layers)))
    trial, check = made[0]
    whole = list(range(task.num_samples))
    # With what happens the first time alone.
    num_bytes = kept + max(most_bytes(lambda: trial(whole)), most_bytes(check))
    trial([0])
    sample = least_seconds_of(lambda: trial([0]))
    batch = least_seconds_of(lambda: trial(whole))
    seconds = task.num_samples * sample * columns + WHOLE_BATCHES * batch + seconds_of(check)
    return seconds, num_bytes + result_bytes(layers)
