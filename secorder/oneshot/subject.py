"""The subject of one-shot measurements, layers of a model, and its Fisher and Hessian on a batch or a data set.

It needs no hooks and no sums: a probe has both for training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batch import batch_size
from ..errors import InvalidArgumentError
from ..layers.selection import Layer, present
from ..means import mean_over_ranks
from ..parallel.all_reduce import raised_on_all
from ..parallel.fsdp import gathered
from ..parallel.ranks import Ranks
from ..results import Diagonals
from .data_set import takes_data_sets
from .fisher import FisherType, check_fisher_type, fisher_budget, fisher_diagonal
from .hessian.budget import Budget, HessianMethod
from .hessian.diagonal import hessian_diagonal
from .isolation import Result
from .measurement import Measurement, measure
from .warn import warn_if_estimated, warn_if_inexact, warn_if_not_finite

__all__ = ["Subject", "fisher_of", "hessian_of"]

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """What one-shot measurements are taken of: layers of a model.

    Attributes:
        model: the model.
        layers: those to measure.
        ranks: that parameters lie over, if any do.
        sample_dim: where samples are in the inputs.
        reduction: of the loss over samples, where that was told.
    """

    model: nn.Module
    layers: Sequence[Layer]
    ranks: Ranks | None
    sample_dim: int = 0
    reduction: Literal["mean", "sum"] | None = None

    @property
    def data_context(self) -> tuple[nn.Module, int, Literal["mean", "sum"] | None]:
        """The model, where samples are in its inputs, and the reduction that was told, for measuring data sets."""
        return self.model, self.sample_dim, self.reduction

    def measure(
        self,
        work: Callable[[Measurement], Result],
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any,
        *,
        by_sample: bool = False,
        **options: Any,
    ) -> Result:
        """``work`` on the isolated model."""
        batch = loss_fn, inputs, targets
        with self._whole_layers() as layers:
            return measure(work, self.model, layers, *batch, by_sample=by_sample, sample_dim=self.sample_dim, **options)

    @contextmanager
    def _whole_layers(self) -> Iterator[Sequence[Layer]]:
        """The layers for passes of our own: under ``fully_shard`` with their parameters gathered."""
        if self.ranks is not None and self.ranks.tensor:
            raise InvalidArgumentError(
                "one-shot measurements are not supported where parts of layers lie over ranks (tensor parallelism): "
                "measure a copy of the model that is not cut, or read what training accumulates."
            )
        if not any(layer.sharded for layer in self.layers):
            yield [present(layer) for layer in self.layers]
            return
        with gathered(self.model):
            yield [
                replace(
                    layer, parameters={name: layer.module.get_parameter(name) for name in layer.parameters}, spread=None
                )
                for layer in self.layers
            ]


@takes_data_sets(by_sample=lambda options: True)
def fisher_of(
    subject: Subject,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any = None,
    *,
    fisher_type: FisherType = "empirical",
    num_draws: int = 1,
    rtol: float | None = None,
    max_draws: int = 10_000,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
    synchronize: bool = False,
) -> Diagonals:
    """The Fisher diagonal; see :meth:`secorder.CurvatureProbe.fisher_diagonal`, which this function carries out."""
    check_fisher_type(fisher_type, num_draws)
    budget = fisher_budget(fisher_type, rtol, max_draws, create_graph=create_graph)
    with raised_on_all() if synchronize else nullcontext():
        fisher = subject.measure(
            lambda task: fisher_diagonal(task, fisher_type, num_draws, budget),
            loss_fn,
            inputs,
            targets,
            by_sample=True,
            generator=generator,
            create_graph=create_graph,
            chunk_size=chunk_size,
            progress=progress,
        )
        warn_if_not_finite(fisher, "Fisher")
    return mean_over_ranks(fisher, batch_size(inputs, targets, subject.sample_dim)) if synchronize else fisher


@takes_data_sets(by_sample=lambda options: False)
def hessian_of(
    subject: Subject,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any = None,
    *,
    method: HessianMethod = "auto",
    num_draws: int | None = None,
    rtol: float | None = None,
    max_draws: int = 10_000,
    max_hvps: int | None = None,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
) -> Diagonals:
    """The Hessian diagonal; see :meth:`secorder.CurvatureProbe.hessian_diagonal`, which this function carries out."""
    budget = Budget.checked(method, num_draws, rtol, max_draws, max_hvps)
    if create_graph and method == "hutchinson":
        raise InvalidArgumentError('create_graph=True needs method="exact".')
    hessian = subject.measure(
        lambda task: hessian_diagonal(task, budget),
        loss_fn,
        inputs,
        targets,
        generator=generator,
        create_graph=create_graph,
        chunk_size=chunk_size,
        progress=progress,
    )
    if method == "auto":
        warn_if_estimated({name: info.num_draws for name, info in hessian.info.items()})
    warn_if_not_finite(hessian, "Hessian")
    warn_if_inexact(subject.layers)
    return hessian
