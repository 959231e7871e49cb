"""How exact a measurement is to be, and what it may cost."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..._arguments import refuse_unused_draws, require_integer, require_number, require_one_of
from ...errors import InvalidArgumentError

__all__ = ["Budget"]

HessianMethod = Literal["auto", "exact", "hutchinson"]

#: Where ``method="auto"`` goes over from exact to estimated: Hessian-vector products of one layer.
MAX_HVPS = 10_000

#: And such products times the numbers that one of them passes through (activations and outputs): some ten seconds.
MAX_WORK = 1_000_000_000

#: What ``method="auto"`` may take in all, in seconds, where products are many enough to be timed.
AUTO_SECONDS = 10.0

#: Draws at most, where an error is asked for.
MAX_DRAWS = 10_000

#: The relative error that ``method="auto"`` asks of its estimates.
AUTO_RTOL = 0.05


@dataclass(frozen=True)
class Budget:
    """How exact a measurement is to be, and what it may cost.

    Attributes:
        method: ``"exact"``, ``"hutchinson"``, or ``"auto"``: exact where a layer takes at most ``max_hvps``.
        num_draws: draws of an estimate; the least number where ``rtol`` is given.
        rtol: draw until a layer's relative error ``‖standard error‖ / ‖diagonal‖`` is at most this.
        max_draws: draws at most.
        max_hvps: Hessian-vector products that an exact strategy may take for one layer.
        max_work: such products times the numbers that each passes through, where they were not timed.
        max_seconds: what exact strategies may take for all layers together, where products were timed.
        draw_seconds: what draws beyond the least number may take for all layers together.
    """

    method: HessianMethod = "exact"
    num_draws: int = 100
    rtol: float | None = None
    max_draws: int = MAX_DRAWS
    max_hvps: int | None = None
    max_work: float = math.inf
    max_seconds: float = math.inf
    draw_seconds: float = math.inf

    @classmethod
    def checked(
        cls,
        method: HessianMethod,
        num_draws: int | None,
        rtol: float | None,
        max_draws: int | None,
        max_hvps: int | None,
    ) -> "Budget":
        """The budget of arguments as users pass them.

        Raises:
            InvalidArgumentError: one is out of its range, or they contradict each other.
        """
        require_one_of("method", method, get_args(HessianMethod))
        if num_draws is not None:
            require_integer("num_draws", num_draws, 1)
        if rtol is not None:
            require_number("rtol", rtol)
        if max_draws is not None:
            require_integer("max_draws", max_draws, 1)
        if max_hvps is not None:
            require_integer("max_hvps", max_hvps, 0)
        refuse_unused_draws(method, num_draws, rtol, max_draws, max_hvps)
        max_work = max_seconds = draw_seconds = math.inf
        if method == "auto" and max_hvps is None:
            max_hvps, max_work, max_seconds = MAX_HVPS, MAX_WORK, AUTO_SECONDS
            draw_seconds = AUTO_SECONDS / 2 if rtol is None else math.inf
        if method == "auto":
            rtol = AUTO_RTOL if rtol is None and num_draws is None else rtol
        draws = num_draws or (16 if rtol is not None else 100)
        most = MAX_DRAWS if max_draws is None else max_draws
        if rtol is not None and most < draws:
            raise InvalidArgumentError(f"max_draws must be at least num_draws ({draws}), got {most}.")
        return cls(method, draws, rtol, most, max_hvps, max_work, max_seconds, draw_seconds)

    def fewer(self, spent: int) -> "Budget":
        """The budget when some of the products of its draws were used otherwise."""
        if not spent:
            return self
        if self.rtol is None:
            return replace(self, num_draws=max(2, self.num_draws - spent))
        return replace(self, max_draws=max(self.num_draws, self.max_draws - spent))

    def after(self, seconds: float) -> "Budget":
        """The budget when so many seconds of its own were spent; a quarter is left, for what cannot do with nothing."""
        if self.max_seconds == math.inf:
            return self
        left = max(0.25, 1 - seconds / self.max_seconds)
        return replace(self, max_seconds=left * self.max_seconds, draw_seconds=left * self.draw_seconds)

    def within(self, seconds: float, by_draw: float) -> "Budget":
        """The budget with as many draws as fit in the seconds, at least two, where an error is asked for.

        ``by_draw`` is what each takes; 0 if that is not known.
        """
        if self.rtol is None or not by_draw or seconds == math.inf:
            return self
        most = max(2, int(seconds / by_draw))
        return replace(self, num_draws=min(self.num_draws, most), max_draws=min(self.max_draws, most))

    def closer(self, factor: float) -> "Budget":
        """The budget with so much less of an error."""
        return self if self.rtol is None else replace(self, rtol=factor * self.rtol)

    def affords(self, num_products: int, elements: int, seconds: float = 0.0) -> bool:
        """Whether an exact strategy may be taken: so many products, each of which passes through so many elements.

        ``seconds`` is what each takes; 0 if that is not known.
        """
        if self.method == "exact":
            return True
        if self.max_hvps is None or num_products > self.max_hvps:
            return False
        return num_products * seconds <= self.max_seconds if seconds else num_products * elements <= self.max_work
