"""Traces of each layer's block, by the same strategies as diagonals."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch.pytree import tensors_in
from ..results import brief
from .fisher import fisher_diagonal, fisher_means
from .fisher_by_weight import ByWeight
from .fisher_pairs import Asked
from .hessian.budget import Budget
from .hessian.estimate import ENOUGH, Estimate
from .hessian.output_draws import Reduce, reduced
from .hessian.run import carry_out
from .measurement import Measurement
from .operators import By, Curvature, blocks_of


@dataclass(frozen=True)
class Trace:
    """The trace of a layer's block of the Hessian, the GGN or the Fisher.

    Attributes:
        value: an unbiased estimate, or the exact number.
        standard_error: of the estimate; 0 where it is exact, inf after one draw.
        num_draws: draws; 0 where it is exact.
        converged: whether ``rtol`` was met; where none was asked for, whether the error is below half the value.
        num_samples: for an empirical Fisher that training accumulated, how many samples it has seen; its standard error
            is that of a mean over samples, or nan if it is not known. None otherwise.
    """

    value: float
    standard_error: float
    num_draws: int
    converged: bool
    num_samples: int | None = None

    __repr__ = brief

    @property
    def relative_error(self) -> float:
        """The standard error relative to the value; 0 where the trace is exact."""
        return self.standard_error / abs(self.value) if self.value else 0.0 if self.standard_error == 0 else math.inf


def traces(task: Measurement, budget: Budget, *, of: Curvature = "hessian", by: By = "layer") -> dict[str, Trace]:
    """The trace of each block.

    See :meth:`secorder.CurvatureProbe.hessian_trace`, which this function carries out.
    """
    if of == "hessian":
        estimates = {name: o.estimate for name, o in carry_out(task, budget, sums(by)).items()}
    elif of == "ggn" and (budget.method == "hutchinson" or _takes_long(task, budget)):
        estimates = _of_ggn(task, budget, sums(by))
    else:
        diagonals = fisher_diagonal(task, Asked("type-2" if of == "ggn" else "empirical"))
        estimates = {
            layer.name: Estimate(reduced(sums(by), diagonals[layer.name].split(layer.sizes()))) for layer in task.layers
        }
    found = {}
    for layer in task.layers:
        estimate = estimates[layer.name]
        for index, name in enumerate(blocks_of(layer, by)):
            found[name] = _trace(estimate, index, budget)
    return found


def _of_ggn(task: Measurement, budget: Budget, reduce: Reduce) -> dict[str, Estimate]:
    """Of the GGN, by draws on the outputs: exact where there are no more outputs than draws, else unbiased estimates.

    With S a root of the loss's Hessian in the outputs, ``E[(Jᵀ S v)²]`` for random signs v on its columns: a draw takes
    one vector-Jacobian product for all layers together. The heaviest columns of each sample are taken exactly
    (:mod:`.heaviest`).
    """
    weighted = ByWeight(budget, reduce)
    found = fisher_means(task, Asked("type-2"), weighted)
    exact = {name: values for name, (values, _) in found.items() if name not in weighted.estimates}
    return weighted.estimates | {name: Estimate(reduced(reduce, values)) for name, values in exact.items()}


def _takes_long(task: Measurement, budget: Budget) -> bool:
    """Whether a column for each output is more than the budget affords, by the time that a forward takes."""
    if budget.method == "exact":
        return False
    start = time.perf_counter()
    output, _ = task.loss()
    seconds = time.perf_counter() - start
    outputs = sum(t.numel() for t in tensors_in(output) if t.requires_grad)
    return not budget.affords(outputs // task.num_samples, outputs, 2 * seconds)


def sums(by: By) -> Reduce:
    """Sums of stacked diagonals: of all parameters together, or of each; in shape ``(k, 1)``."""

    def sums(values: list[Tensor]) -> list[Tensor]:
        each = [v.flatten(1).sum(1, keepdim=True) for v in values]
        return each if by == "parameter" else [torch.stack(each).sum(0)]

    return sums


def _trace(estimate: Estimate, index: int, budget: Budget) -> Trace:
    value = estimate.values[index].item()
    if not estimate.errors:
        return Trace(value, 0.0, 0, True)
    error = estimate.errors[index].item()
    enough = ENOUGH if budget.rtol is None else budget.rtol
    return Trace(value, error, estimate.num_draws, error <= enough * abs(value))
