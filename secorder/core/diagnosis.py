"""One-shot diagnosis: Fisher, Hessian, their statistics, and findings in words."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._arguments import require_flag, require_integer, require_one_of
from .._keywords import refuses_renamed_keywords
from .._torch.random_state import random_state_kept
from ..batch import NO_BATCH, batch_size
from ..errors import CouplingError, CurvatureWarning, InvalidArgumentError, NonFiniteError, SecorderError
from ..layers.selection import LayerTypes
from ..monitor.findings import Diagnosis, find
from ..monitor.progress import progress_bar
from ..monitor.statistics import layer_statistics
from ..oneshot.data_set import batches_of, is_data_set, number_of_batches
from ..oneshot.hessian.budget import Budget, HessianMethod
from ..oneshot.loss import losses
from ..oneshot.loss_reduction import LossReduction
from ..oneshot.warn import warn_if_estimated
from ..probe import CurvatureProbe
from ..results import Diagonals

__all__ = ["diagnose"]


@refuses_renamed_keywords
def diagnose(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    layer_types: LayerTypes = None,
    *,
    layers: str | Iterable[str] | None = None,
    frozen: bool = False,
    method: HessianMethod = "auto",
    num_draws: int | None = None,
    rtol: float | None = None,
    max_draws: int | None = None,
    max_hvps: int | None = None,
    chunk_size: int | None = None,
    reduction: Literal["mean", "sum"] | None = None,
    sample_dim: int = 0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Measure Fisher and Hessian diagonals of a batch, or of a whole data set, and say what stands out.

    Args:
        model: any module; left as it was found.
        loss_fn: ``loss_fn(model(inputs), targets)`` → scalar.
        inputs: a batch; or, in place of the batch, a ``DataLoader`` (any iterable of ``(inputs, targets)`` that is not
            itself a tensor, tuple, list or dict): the result is that of all its samples together.
        targets: what ``loss_fn`` takes second; None with a ``DataLoader``.
        layer_types, layers, frozen: as for :class:`secorder.CurvatureProbe`.
        method, num_draws, rtol, max_draws, max_hvps, chunk_size: of the Hessian, as for
            :meth:`secorder.CurvatureProbe.hessian_diagonal`.
        reduction: how the loss reduces samples, ``"mean"`` or ``"sum"``, which the Hessian of several batches depends
            on; by default it is found out from the loss of a batch and of its halves.
        sample_dim: the dimension of the inputs that holds the samples.
        generator: random numbers of draws and checks.
        progress: show a progress bar over the batches.

    Returns:
        a :class:`Diagnosis`: ``print`` it, or read its ``fisher``, ``hessian``, ``statistics`` and ``findings``.

    Raises:
        SecorderError: as the probe's measurements; coupled samples are no error here but a finding.

    Example:
        >>> import torch, secorder
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> inputs, labels = torch.randn(32, 4), torch.randint(3, (32,))
        >>> diagnosis = secorder.diagnose(model, torch.nn.functional.cross_entropy, inputs, labels)
        >>> sorted(diagnosis.statistics), diagnosis.num_samples
        (['fisher', 'hessian'], 32)
    """
    require_one_of("reduction", reduction, ("mean", "sum", None))
    require_integer("sample_dim", sample_dim, 0)
    require_flag("progress", progress)
    data: Iterable[Any] = inputs if is_data_set(inputs, targets) else [(inputs, targets)]
    common: dict[str, Any] = {"generator": generator, "chunk_size": chunk_size}
    drawn: dict[str, Any] = {"num_draws": num_draws, "rtol": rtol, "max_draws": max_draws, "max_hvps": max_hvps}
    Budget.checked(method, **drawn)
    fisher: Diagonals | None = None
    hessian: Diagonals | None = None
    refused: SecorderError | None = None
    seen, whole_loss, reduces = 0, 0.0, LossReduction(model, loss_fn, sample_dim, certain=reduction)
    with (
        CurvatureProbe(model, layer_types, layers=layers, frozen=frozen, sample_dim=sample_dim) as probe,
        warnings.catch_warnings(),
        random_state_kept(model),
        progress_bar(progress, "Curvature", number_of_batches(data), unit="batches") as advance,
    ):
        warnings.simplefilter("ignore", CurvatureWarning)  # findings, and one warning for all batches
        for x, t in batches_of(data, sample_dim):
            count = batch_size(x, t, sample_dim)
            before = reduces.add_batch(x, t, count)
            if hessian is not None and before > 1:
                hessian, whole_loss = hessian / before, whole_loss / before
            loss = losses(model, loss_fn, [(x, t)]).item()
            if refused is None:
                try:
                    fisher = _plus(fisher, count, probe.fisher_diagonal(loss_fn, x, t, **common))
                except (CouplingError, NonFiniteError) as error:  # of the latter, the Hessian's findings tell
                    refused = error
            weight = 1.0 if reduces.summed else float(count)
            hessian = _plus(hessian, weight, probe.hessian_diagonal(loss_fn, x, t, method=method, **drawn, **common))
            whole_loss += weight * loss
            seen += count
            advance(1)
    reduces.require()
    if method == "auto" and hessian is not None:
        warn_if_estimated(hessian.info)
    coupled = refused if isinstance(refused, CouplingError) else None
    return _concluded(fisher if refused is None else None, hessian, seen, whole_loss, reduces.summed, coupled)


def _plus(total: Diagonals | None, weight: float, part: Diagonals) -> Diagonals:
    return weight * part if total is None else total + weight * part


def _concluded(
    fisher: Diagonals | None,
    hessian: Diagonals | None,
    seen: int,
    whole_loss: float,
    summed: bool,
    coupled: CouplingError | None,
) -> Diagnosis:
    """What was added up over the batches, as means where the loss is one, and what stands out."""
    if hessian is None:
        raise InvalidArgumentError(NO_BATCH)
    if not summed:
        hessian, whole_loss = hessian / seen, whole_loss / seen
    fisher = None if fisher is None else fisher / seen
    measured = {"hessian": hessian} | ({} if fisher is None else {"fisher": fisher})
    statistics = {name: layer_statistics(diagonals) for name, diagonals in measured.items()}
    findings = find(hessian, statistics, seen if summed else 1, coupled)
    return Diagnosis(fisher, hessian, statistics, findings, seen, whole_loss)
