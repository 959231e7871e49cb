"""Sums and means of diagonals: over batches, over ranks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from operator import add

import torch
from torch import Tensor

from ._arguments import require_number
from .errors import InvalidArgumentError, InvalidTypeError
from .parallel.all_reduce import add_up, raised_on_all
from .results import Diagonals

__all__ = ["mean_over_ranks", "weighted_mean"]


def weighted_mean(diagonals: Iterable[Diagonals], weights: Iterable[float] | None = None) -> Diagonals:
    """``Σ_b w_b D_b / Σ_b w_b``, entry by entry: the diagonal for all of the data from those for its parts.

    Args:
        diagonals: several, of the same layers.
        weights: one each, None for equal weights; for a Fisher, and for the Hessian of a mean loss, the numbers of
            samples.

    Returns:
        their mean; standard errors are combined as those of independent estimates.

    Raises:
        InvalidTypeError: these are not diagonals, or the weights are not numbers.
        InvalidArgumentError: there are no diagonals, or not as many weights, or no positive one.

    Example:
        >>> import torch, secorder
        >>> probe, loss_fn = secorder.CurvatureProbe(torch.nn.Sequential(torch.nn.Linear(3, 2))), torch.nn.MSELoss()
        >>> parts = [probe.fisher_diagonal(loss_fn, torch.randn(n, 3), torch.randn(n, 2)) for n in (4, 6)]
        >>> secorder.weighted_mean(parts, [4, 6])["0"].shape
        torch.Size([8])
    """
    several = isinstance(diagonals, Iterable) and not isinstance(diagonals, (Diagonals, Tensor))
    parts = list(diagonals) if several else []
    if not several or not all(isinstance(part, Diagonals) for part in parts):
        raise InvalidTypeError("weighted_mean takes several diagonals, in a list.")
    try:
        given = [1.0] * len(parts) if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"weighted_mean takes a number for each of the diagonals: {error}.") from error
    if not parts or len(given) != len(parts) or min(given) < 0 or not (sum(given) > 0 and isfinite(sum(given))):
        raise InvalidArgumentError(
            f"weighted_mean takes as many weights as diagonals, at least one, of a positive sum: got {len(parts)} "
            f"diagonals and weights {given}."
        )
    return reduce(add, [weight / sum(given) * part for part, weight in zip(parts, given, strict=True)])


def mean_over_ranks(
    diagonals: Diagonals | Callable[[], Diagonals], weight: float, group: "torch.distributed.ProcessGroup | None" = None
) -> Diagonals:
    """``Σ_r w_r D_r / Σ_r w_r`` over the ranks: the diagonal of the whole batch from those of its parts.

    Args:
        diagonals: of this rank's part of the batch; or a function that measures them, which every rank must pass then:
            where it raises on one rank, it raises on all of them, and none waits for the others.
        weight: its number of samples, for a Fisher and for the Hessian of a mean loss.
        group: a process group; the default group if None.

    Returns:
        the same on every rank; standard errors are combined as those of independent estimates.

    Raises:
        ProbeStateError: ``torch.distributed`` is not initialised, or measuring failed on another rank.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from secorder import CurvatureProbe
        >>> from secorder.means import mean_over_ranks
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # one process, alone
        >>> loss_fn, inputs, targets = torch.nn.functional.mse_loss, torch.randn(8, 3), torch.randn(8, 2)
        >>> with CurvatureProbe(torch.nn.Sequential(torch.nn.Linear(3, 2))) as probe:
        ...     hessian = mean_over_ranks(lambda: probe.hessian_diagonal(loss_fn, inputs, targets), len(inputs))
        >>> hessian["0"].shape
        torch.Size([8])
        >>> dist.destroy_process_group()
    """
    require_number("weight", weight, zero=True)
    if not isinstance(diagonals, Diagonals):
        with raised_on_all(group):
            diagonals = diagonals()
    total = torch.tensor(weight, dtype=torch.float64)
    values = {name: weight * d for name, d in diagonals.items()}
    errors = {name: (weight * e) ** 2 for name, e in (diagonals.standard_error or {}).items()}
    add_up([total, *values.values(), *errors.values()], group)
    whole = total.item()
    return diagonals.replaced(
        {name: d / whole for name, d in values.items()},
        {name: e.sqrt() / whole for name, e in errors.items()} if diagonals.standard_error is not None else None,
    )


@dataclass
class RunningMean:
    """The weighted mean of what comes batch by batch, and its standard error, without keeping the batches.

    With w_b the weight of a batch and M its mean, in which batches have the variance σ²/w_b: σ² is estimated by
    ``Σ_b w_b (D_b − M)² / (B − 1)``, and the standard error is ``√(σ² / Σ_b w_b)`` (West 1979, "Updating mean and
    variance estimates: an improved method").
    """

    mean: list[Tensor]  #: so far
    squares: list[Tensor]  #: Σ_b w_b (D_b − M)²
    weight: float = 0.0  #: Σ_b w_b
    num_batches: int = 0  #: B

    @classmethod
    def like(cls, values: Sequence[Tensor]) -> "RunningMean":
        """Nothing yet, of such values."""
        return cls([torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values])

    def add(self, values: Sequence[Tensor], weight: float) -> None:
        """Another batch."""
        self.weight += weight
        self.num_batches += 1
        share = weight / self.weight if self.weight else 0.0
        for mean, square, value in zip(self.mean, self.squares, values, strict=True):
            delta = value.to(mean) - mean
            mean.add_(delta, alpha=share)
            square.addcmul_(delta, delta, value=weight * (1 - share))  # what is left of the difference

    @property
    def standard_error(self) -> list[Tensor]:
        """Of the mean; inf after one batch, which tells nothing of it."""
        if self.num_batches < 2:
            return [torch.full_like(s, torch.inf) for s in self.squares]
        return [s.clamp(min=0).div_((self.num_batches - 1) * self.weight).sqrt_() for s in self.squares]
