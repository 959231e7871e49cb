"""The losses of samples alone, as functions of the model's output, where the batch's loss goes by that alone."""

import cmath
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._torch.pytree import map_tensors, tensors_in
from .._torch.vjp import gradients
from ..errors import CouplingError, NonFiniteError, SecorderError
from .independence import block_diagonal
from .known_losses import made_of_samples, share_of_samples, softmax_scale
from .loss import require_dependence
from .measurement import Measurement
from .output_hessian import expose_output, filled, loss_of_output, output_points
from .recorded_layer import RecordedLayer
from .root_forms import cross_entropy_root
from .roots import Root
from .sample_losses import BatchLoss, gradients_of_rows, own_gradients, own_losses


@dataclass
class SampleLosses:
    """The losses ℓ_n of samples taken alone, as functions of the model's output, by their derivatives."""

    gradients: list[Tensor | None]  #: of Σ_n ℓ_n in ``points``; differentiable where second derivatives were asked for
    points: list[Tensor]  #: what they were computed from, samples in dim 0
    model_outputs: list[Tensor]  #: the model's output tensors in the same form
    #: of Σ_n ℓ_n in leaves of the model's graph, by ``id``, where these came in the same backward pass
    at_leaves: dict[int, Tensor] = field(default_factory=dict)
    root: Root | None = None  #: of the Hessian, where it is known without any derivative


def losses_by_definition(
    task: Measurement, output: Any, loss: Tensor, leaves: Sequence[Tensor], *, second_order: bool
) -> SampleLosses | None:
    """Of a loss of PyTorch's own that tells what a sample's part in it is, where no hook changes its gradient.

    Where each sample has one cotangent alone, gradients of the model's ``leaves`` come in the same pass.
    """
    share = precise_share(task, output)
    if share is None or not output.requires_grad:
        return None
    scale = softmax_scale(task.loss_fn, output, task.targets) if second_order and not task.create_graph else None
    if scale is not None:
        return SampleLosses([None], [output], [output], root=cross_entropy_root(output.detach(), scale))
    if second_order or task.create_graph:
        found = gradients(loss, [output], create_graph=True)
        _require_finite(found)
        return SampleLosses(_divided(found, share), [output], [output])
    first, *others = gradients(loss, [output, *leaves], [torch.full_like(loss, 1 / share)])
    _require_finite([first])
    at_leaves = {id(x): g for x, g in zip(leaves, filled(others, leaves), strict=True)}
    return SampleLosses([first], [output], [output], at_leaves)


def precise_share(task: Measurement, output: Any) -> float | None:
    """The sample's share in the loss, unless what the loss computes with is half precision."""
    share = None if task.autocast else share_of_samples(task.loss_fn, output, task.targets, task.num_samples)
    return share if share is not None and torch.finfo(output.dtype).bits >= 32 else None


def losses_by_output(
    task: Measurement, output: Any, loss: Tensor, layers: Sequence[RecordedLayer], *, second_order: bool
) -> SampleLosses | None:
    """The losses of samples, where the batch's is made of them by the model's output alone; else None.

    The loss must take nothing from inside of the recorded layers. Raises where it couples samples, has no finite
    gradient, holds tensors of the batch itself, or is random.
    """
    differentiable = [t for t in tensors_in(output) if t.requires_grad]
    if not differentiable or any(task.dimension(t) is None for t in differentiable):
        return None
    model_outputs = output_points(output, task.dimension)
    by_output = loss_of_output(task.loss_again, output, task.targets, task.dimension, loss)
    if by_output is None:
        return None
    batch = BatchLoss(*by_output)
    del by_output
    if task.enters_model(batch.loss, [leaf for z in layers for leaf in z.leaves]):
        return None  # a weight penalty, features taken from inside the model, the model itself
    if all(g is None for g in batch.gradients):
        require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
    _require_finite(batch.gradients)
    share = precise_share(task, output)
    if share is not None:
        if not second_order:
            batch.release()
        found = _divided(batch.gradients, share)
    elif second_order or task.create_graph:
        _require_separate(task, batch)
        found = own_gradients(task, batch, second_order=second_order)
    else:
        found = _own_gradients(task, batch, output, loss)
    if not task.create_graph:
        return SampleLosses(found, batch.points, model_outputs)
    # The cotangents must stay connected to the model.
    apart = map_tensors(lambda t: t.view_as(t), output)  # nodes of their own, which no other output depends on
    connected, points = expose_output(apart, task.dimension, detach=False)
    found = gradients(own_losses(task, connected).sum(), points, create_graph=True)
    return SampleLosses(found, points, model_outputs)


def _own_gradients(task: Measurement, batch: BatchLoss, output: Any, loss: Tensor) -> list[Tensor | None]:
    """The losses' own gradients, which are the batch's, as are products with its Hessian: so it couples nothing."""
    if not made_of_samples(task.loss_fn, batch.output, task.targets):
        found = gradients_of_rows(task, batch)
        if found is not None:
            return found
        if not batch.loss.requires_grad:  # which was released
            again = loss_of_output(task.loss_again, output, task.targets, task.dimension, loss)
            batch = batch if again is None else BatchLoss(*again)
    try:
        return own_gradients(task, batch, second_order=False)
    except SecorderError:
        again = loss_of_output(task.loss_again, output, task.targets, task.dimension, loss)
        if again is not None:
            _require_separate(task, BatchLoss(*again))
        raise


def _require_separate(task: Measurement, batch: BatchLoss) -> None:
    if not block_diagonal(batch.gradients, batch.points, task.generator):
        raise CouplingError(
            "the loss couples the samples of a batch (a contrastive loss, a batch statistic), so that per-sample "
            "gradients are not defined: use a loss that is a mean or sum over samples; hessian_diagonal stays exact."
        )


def _divided(found: Sequence[Tensor | None], share: float) -> list[Tensor | None]:
    return [g if g is None or share == 1 else g / share for g in found]


def _require_finite(found: Sequence[Tensor | None]) -> None:
    known = [g.detach() for g in found if g is not None]
    if not all(cmath.isfinite(g.sum().item()) or bool(g.isfinite().all()) for g in known):  # sums may overflow
        raise NonFiniteError(
            "the gradient of the loss in the model's output holds nan or infinite entries, though the loss is finite "
            "(a root or norm of zero, an overflow): there are no per-sample gradients here."
        )
