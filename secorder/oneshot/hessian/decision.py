"""Whether products are timed before strategies are chosen, and what was told of their seconds before."""

import math
from collections.abc import Hashable, Mapping

import torch

from ...results import Strategy
from ..measurement import Measurement
from ..recording import Recording
from .budget import AUTO_SECONDS, Budget
from .facts import Facts
from .investigate import Findings, verify_samples
from .trials import LONG_WORK, alike, get_ready, learn_seconds

#: Forwards that a Hessian-vector product takes as long as, about.
FORWARDS = 5


def matters(found: Findings, budget: Budget) -> bool:
    """Whether there is so much to do that the choice may depend on how long a product takes."""
    if budget.method == "hutchinson":
        return False
    chosen = found.chosen(budget)
    rest = [f for f in found.facts.values() if f.used and not f.last]
    if sum(f.chain_work for f in rest if chosen[f.layer].strategy == Strategy.CHAIN) > LONG_WORK:
        return True
    by_columns = {chosen[f.layer].exact_products for f in rest if chosen[f.layer].strategy == Strategy.COLUMNS}
    others = [f for f in rest if chosen[f.layer].strategy not in (Strategy.CHAIN, Strategy.COLUMNS)]
    enough = budget.max_seconds / 10
    if budget.max_seconds == math.inf:  # where there is no choice, nothing depends on it
        by_columns, others, enough = set(), [f for f in others if len(alike(f)) > 1], AUTO_SECONDS
    products = max(by_columns, default=0) + sum(chosen[f.layer].exact_products for f in others)
    return products * FORWARDS * found.seconds > enough  # columns are those of all


def circumstances(task: Measurement, found: Findings, budget: Budget) -> Hashable:
    """What the seconds of products depend on, as far as it is known before there are trials, but for the forward."""
    loss = getattr(task.loss_fn, "__qualname__", type(task.loss_fn).__qualname__)
    devices = frozenset(p.device for layer in task.layers for p in layer.parameters.values())
    return tuple(found.facts.values()), budget, loss, devices, task.chunk_size, torch.get_num_threads()


def decide(task: Measurement, found: Findings, budget: Budget, recording: Recording) -> float | None:
    """Time products where the choice depends on it; or take what was told of these before, so that it is the same.

    Returns what was told, if it was, of the seconds that the chain takes.
    """
    of = circumstances(task, found, budget)
    if task.told.holds(of, found.seconds):
        _take_over(task, found, budget, task.told.facts)
        return task.told.by_chain
    if matters(found, budget):
        learn_seconds(task, found, budget, recording)
        task.told.keep(of, found.facts, found.seconds)
    return None


def _take_over(task: Measurement, found: Findings, budget: Budget, told: Mapping[str, Facts]) -> None:
    """Enter seconds that were told, and get ready whatever may be chosen by them."""
    get_ready(task, found, budget, [name for name, facts in told.items() if facts.chain_seconds is not None])
    for fields in (["seconds_by_column"], ["seconds", "seconds_on_parameters", "chain_seconds"]):
        for name, facts in told.items():
            found.learn(name, **{field: getattr(facts, field) for field in fields})
        verify_samples(task, found, budget)
