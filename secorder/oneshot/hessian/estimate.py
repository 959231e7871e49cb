"""Means of draws with their standard errors."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..._torch.vjp import chunks
from ...results import relative_error
from .budget import Budget

#: ``draw(k)`` gives k draws of each value, stacked.
Draw = Callable[[int], list[Tensor]]

#: The relative error above which an estimate does not pass for one where nothing was asked of it.
ENOUGH = 0.5


@dataclass
class Estimate:
    """Values, exact or estimated."""

    values: list[Tensor]  #: by parameter, or what was asked for
    errors: list[Tensor] = field(default_factory=list)  #: their standard errors; nothing where they are exact
    num_draws: int = 0  #: draws that they are the mean of
    #: whether ``rtol`` was met; where none was asked for, whether the error is below :data:`ENOUGH`
    converged: bool = True

    @property
    def relative_error(self) -> float:
        """``‖standard error‖ / ‖values‖``."""
        return relative_error(self.values, self.errors) if self.errors else 0.0

    def beside(self, errors: Sequence[Tensor], budget: Budget) -> "Estimate":
        """The same with the errors of what is independent of it, and was added."""
        both = [torch.hypot(own, other) for own, other in zip(self.errors, errors, strict=True)]
        (found,) = Estimate(self.values, both, self.num_draws).split([len(both)], budget)
        return found

    def split(self, sizes: Sequence[int], budget: Budget) -> list["Estimate"]:
        """Those of several layers, each with so many values."""
        enough = ENOUGH if budget.rtol is None else budget.rtol
        found, start = [], 0
        for size in sizes:
            here = slice(start, start + size)
            found.append(Estimate(self.values[here], self.errors[here], self.num_draws))
            found[-1].converged = found[-1].relative_error <= enough
            start += size
        return found


def draws_for(budget: Budget, made: int, errors: Sequence[Tensor], whole: Estimate) -> float:
    """How many draws bring errors, which so many left, down to ``rtol`` of values that were drawn themselves."""
    error, own, norm = (
        float(torch.cat([v.flatten() for v in x]).double().norm()) if x else 0.0
        for x in (errors, whole.errors, whole.values)
    )
    known = norm**2 - own**2  # the errors of what was drawn are in it
    if not error or budget.rtol is None:
        return 0.0
    return made * error**2 / (known * budget.rtol**2) if known > 0 else math.inf


def average(
    draw: Draw,
    like: Sequence[Tensor],
    budget: Budget,
    size: int,
    advance: Callable[[int], None],
    known: Sequence[Tensor] = (),
    seconds: float = math.inf,
    groups: Sequence[int] = (),
) -> Estimate:
    """Mean of draws and its standard error (Welford's update), until the budget is content.

    What is ``known`` exactly is added to the mean. After ``seconds`` no more draws are made than the least number. Of
    several layers at once, each of a number of values (``groups``), the worst counts.
    """
    means = [z.clone() for z in like]
    squares, seen = [z.clone() for z in means], 0
    known = list(known) or [z.clone() for z in means]
    wanted, start = budget.num_draws, time.perf_counter()
    while True:
        for ids in chunks(wanted - seen, size):
            for index, values in enumerate(draw(len(ids))):
                for at, value in enumerate(values, start=1):
                    delta = value - means[index]
                    means[index] += delta / (seen + at)
                    squares[index] += delta * (value - means[index])
            seen += len(ids)
            advance(len(ids))
        # One draw tells nothing of its error.
        errors = [(s / (seen - 1) / seen).sqrt() if seen > 1 else torch.full_like(s, torch.inf) for s in squares]
        total = [m + k for m, k in zip(means, known, strict=True)]
        error = max(x.relative_error for x in Estimate(total, errors).split(groups or [len(total)], budget))
        if budget.rtol is None:
            return Estimate(total, errors, seen, error <= ENOUGH)
        # As many more as fit in the time that is left.
        possible = seen * min(1e6, seconds / max(time.perf_counter() - start, 1e-9))
        if error <= budget.rtol or seen >= min(budget.max_draws, int(possible)):
            return Estimate(total, errors, seen, error <= budget.rtol)
        # The error falls with the root of the draws: go most of the way there.
        factor = min(4.0, max(1.2, (error / budget.rtol) ** 2))
        wanted = min(budget.max_draws, math.ceil(seen * factor), int(possible))
