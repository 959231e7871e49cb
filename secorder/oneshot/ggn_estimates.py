"""Estimates of the GGN's diagonal and trace, by draws on the model's outputs."""

from .fisher import fisher_means
from .fisher_by_weight import ByWeight
from .hessian.budget import Budget
from .hessian.estimate import Estimate
from .hessian.output_draws import Reduce, reduced
from .measurement import Measurement


def ggn_estimates(task: Measurement, budget: Budget, reduce: Reduce) -> dict[str, Estimate]:
    """Layer by layer: exact where there are no more outputs than draws, else unbiased estimates.

    With S a root of the loss's Hessian in the outputs, ``E[(Jᵀ S v)²]`` for random signs v on its columns: a draw takes
    one vector-Jacobian product for all layers together. The heaviest columns of each sample are taken exactly
    (:mod:`.heaviest`). ``reduce`` must be linear.
    """
    weighted = ByWeight(budget, reduce)
    found = fisher_means(task, "type-2", 1, weighted)
    estimates: dict[str, Estimate] = {}
    for layer in task.layers:
        known = weighted.estimates.get(layer.name)
        if known is None:
            known = Estimate(reduced(reduce, found[layer.name][0]))
        estimates[layer.name] = known
    return estimates
