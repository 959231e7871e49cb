"""The time that many products take, estimated from two short runs."""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .._torch.memory import most_bytes
from .._torch.vjp import chunks

#: What the trials of all layers may take together, about, beyond one product of each.
TRIAL_SECONDS = 0.5

#: What the trials of all layers may take together where single products are long.
MOST_SECONDS = 0.25

#: And what it may take to look at their memory.
METERED_SECONDS = 0.1

#: How often a short trial is run, and what runs may take together before there is another one.
RUNS, SHORT_SECONDS = 4, 0.05

#: What a product takes from which on it is made once: what happens the first time alone is little beside it.
WARM_SECONDS = 0.01

#: By what factor forwards differ in time that are not of the same; shorter ones differ so by noise.
AS_LONG, SHORT_FORWARD = 4, 0.003

Value = TypeVar("Value")

#: What :func:`~secorder._torch.vjp.chunks` makes of a total and a size.
Pieces = Callable[[int, int], Iterable[range]]

#: Pieces that are run of many alike: of the first one, some happens the first time alone.
PIECES_RUN = 2


@dataclass
class Told:
    """What the last trials told: where all is as it was for them, others would only tell the same with other noise."""

    of: Hashable = None  #: what they were made for
    facts: Mapping[str, Any] = field(default_factory=dict)  #: what was known of each layer after them
    forward: float = 0.0  #: seconds that the forward and the loss took then
    by_chain: float | None = None  #: seconds of the layers that are finished first; None where they were not told of

    def keep(self, of: Hashable, facts: Mapping[str, Any], forward: float, by_chain: float | None = None) -> None:
        """Enter what was told last."""
        self.of, self.facts, self.forward, self.by_chain = of, dict(facts), forward, by_chain

    def holds(self, of: Hashable, forward: float) -> bool:
        """Whether it would be told again: of the same, where the forward and the loss take about as long as then."""
        shorter, longer = sorted(max(SHORT_FORWARD, seconds) for seconds in (self.forward, forward))
        return self.of == of and longer <= AS_LONG * shorter


class Rehearsal:
    """In place of ``chunks``: the first pieces alone, and what the others would take is added up."""

    def __init__(self) -> None:
        self.skipped = 0.0  #: seconds of all pieces that were not run

    def __call__(self, total: int, size: int) -> Iterator[range]:
        """The first of the pieces."""
        pieces = list(chunks(total, size))
        for ids in pieces[:PIECES_RUN]:
            start = now()
            yield ids
            seconds = now() - start
        if len(pieces) > PIECES_RUN:
            self.skipped += (len(pieces) - PIECES_RUN) * seconds


def seconds_per_product(trial: Callable[[int], object], most: int, allowance: float) -> float:
    """Seconds of one of many products, at most so many at once, by a trial in about the seconds that are allowed."""
    few = min(2, most)  # which may be made another way than one alone, and then take longer each
    first = seconds_of(lambda: trial(few))
    if first > max(allowance, few * WARM_SECONDS):
        return first / few
    one = seconds_of(lambda: trial(1))
    count = max(1, min(most, int(allowance / max(one, 1e-9))))
    return one if count == 1 else seconds_of(lambda: trial(count)) / count


def bytes_of_products(trial: Callable[[int], object], most: int, seconds: float, allowance: float) -> int:
    """Memory of so many products at once, each of which takes these seconds; 0 where there is no time for two."""
    count = min(most, int(allowance / max(seconds, 1e-9)))
    return 0 if count < 2 <= most else bytes_at_once(trial, most, count)


def bytes_at_once(trial: Callable[[int], object], most: int, count: int) -> int:
    """Memory of so many at once, by that of one and that of a ``count`` of at least two, if there are."""
    one = most_bytes(lambda: trial(1))
    if most == 1:
        return one
    some = most_bytes(lambda: trial(count))
    return some + (most - count) * max(0, some - one) // (count - 1)


def of_nearest(
    kinds: Mapping[str, Hashable], tell: Callable[[str], Value], most: float = MOST_SECONDS, *, in_order: bool = False
) -> dict[str, tuple[Value, str]]:
    """What is told of each of many, and of which it was told: of the nearest of its kind that there were seconds for.

    Args:
        kinds: of each, by name; one of every kind is asked first, spread over all, or the first one.
        tell: of one, by its name.
        most: seconds after which no other one is begun, beside the first, with which much may happen that one time.
        in_order: ask the first ones first, and no other one where the first takes that long.
    """
    values: dict[str, Value] = {}
    start = time.perf_counter() if in_order else math.inf
    places = {name: place for place, name in enumerate(kinds)}
    order = sorted(places, key=lambda name: f"{places[name]:032b}"[:: 1 if in_order else -1])  # every 16th, 8th, …
    first = {kinds[name]: name for name in reversed(order)}
    for name in sorted(order, key=lambda name: first[kinds[name]] != name):
        if time.perf_counter() - start > most:
            break
        values[name] = tell(name)
        start = min(start, time.perf_counter())
    nearest = {
        name: min(values, key=lambda other: (kinds[other] != kind, abs(places[other] - places[name])))
        for name, kind in kinds.items()
    }
    return {name: (values[other], other) for name, other in nearest.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that it takes, with what it leaves running on an accelerator."""
    start = now()
    work()
    return now() - start


def least_seconds_of(work: Callable[[], object]) -> float:
    """The least of a few runs where they are short: what else the machine does at times makes them longer only."""
    found: list[float] = []
    while len(found) < RUNS and sum(found) < SHORT_SECONDS:
        found.append(seconds_of(work))
    return min(found)


def now() -> float:
    """The time, when all is done that runs on an accelerator."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
