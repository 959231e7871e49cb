"""The losses of samples taken alone, ℓ_n, and the checks that the batch's loss is made of them.

A loss of samples does not change when samples are exchanged, outputs together with targets; and its gradient in one
sample's output is c_n times that of ℓ_n. Where it holds tensors of the batch itself (weights, a teacher's outputs) the
first does not hold, and a batch of one would meet the weights of all; where it takes statistics of the batch, however
detached, the second does not.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.failures import is_out_of_memory, is_vmap_failure
from .._torch.pytree import map_tensors, tensors_in
from .._torch.vjp import gradients, stacked_vjp
from ..errors import CouplingError, InvalidArgumentError, NonFiniteError, SecorderError
from ..layers.dtypes import rounding
from .measurement import Measurement
from .output_hessian import as_samples, expose_output, filled

__all__ = ["own_losses", "require_own_losses"]

#: What to do about a loss that holds what belongs to the samples.
HELD = (
    "if it holds tensors of the batch itself (weights, a teacher's outputs, targets in a closure), pass them in "
    "targets, for example as a tuple: targets=(y, weights)"
)


def own_losses(task: Measurement, output: Any) -> Tensor:
    """ℓ_n, shape (N,): the loss of batches of one, each made of one sample's output and target.

    Raises:
        InvalidArgumentError: the loss works on the batch and fails on a sample alone.
        NonFiniteError: it is nan or infinite on one.
    """
    losses = _by_vmap(task, output) if task.known_loss and not task.autocast else None
    if losses is None:
        losses = torch.stack([_one(task, output, n) for n in range(task.num_samples)])
    finite = losses.detach().isfinite()
    if not bool(finite.all()):
        n = int(finite.logical_not().nonzero()[0])
        raise NonFiniteError(
            f"the loss of sample {n} taken alone is {losses[n].item()}, though that of the batch is finite: it divides "
            "by what only a batch has (a standard deviation, the number of labels that count), so that there is no "
            "per-sample gradient; compute such statistics beforehand and pass them in targets, or leave the sample out."
        )
    return losses


def _by_vmap(task: Measurement, output: Any) -> Tensor | None:
    """All at once, or None where vmap cannot run the loss (or autocast casts otherwise inside of it)."""
    tensors = list(tensors_in((output, task.targets)))
    dims = [task.dimension(t) for t in tensors]
    per_sample = [t for t, dim in zip(tensors, dims, strict=True) if dim is not None]
    kept = [dim for dim in dims if dim is not None]

    def one(*samples: Tensor) -> Tensor:
        rest = iter(zip(samples, kept, strict=True))

        def alone(tensor: Tensor) -> Tensor:
            if task.dimension(tensor) is None:
                return tensor
            sample, dim = next(rest)
            return sample.unsqueeze(dim)

        return task.loss_fn(*map_tensors(alone, (output, task.targets))).reshape(())

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.vmap(one, in_dims=tuple(kept))(*per_sample)
    except RuntimeError as error:  # an operator without a batching rule
        if not is_out_of_memory(error) and not is_vmap_failure(error):
            raise
    except (ValueError, IndexError):  # a target of several rows a sample
        pass
    return None


def _one(task: Measurement, output: Any, n: int) -> Tensor:
    """The loss of sample n alone; where that fails, with targets of several rows a sample cut into as many parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a batch of one, such as that it has no standard deviation
        try:
            return _scalar(task.loss_again(*task.cut(output, [n])))
        except SecorderError:
            raise
        except Exception as error:
            try:
                return _scalar(task.loss_again(*task.cut(output, [n], rows=True)))
            except Exception:
                raise InvalidArgumentError(
                    f"loss_fn works on the batch and fails on sample {n} alone ({type(error).__name__}: "
                    f"{_first_line(error)}): {HELD}."
                ) from error


def _scalar(loss: Tensor) -> Tensor:
    return loss.reshape(())


def _first_line(error: Exception | None) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def require_own_losses(
    task: Measurement,
    output: Any,
    points: Sequence[Tensor],
    output_gradients: Sequence[Tensor | None],
    *,
    second_order: bool,
) -> tuple[Tensor, list[Tensor]] | None:
    """Raise unless the batch's loss treats its samples alike, and is made of their own losses.

    Args:
        task: the measurement.
        output: the model's output, made of ``points``.
        points: samples in dim 0.
        output_gradients: of the batch's loss in ``points``, differentiable.
        second_order: whether second derivatives must be unchanged, too, when samples are exchanged.

    Returns:
        the losses alone and the leaves that they were computed from, where that was done.

    Raises:
        InvalidArgumentError: samples that are exchanged together with their targets get other losses.
        CouplingError: the gradients of the losses alone are not multiples of the batch's.
    """
    if task.num_samples == 1 or (task.known_loss and not _holds_tensors(task.loss_fn)):
        return None
    r = [task.random(x.shape, x) for x in points]
    batch = _derivatives(output_gradients, points, r if second_order else None)
    _require_invariance(task, output, batch, r if second_order else None)
    _require_any_size(task, output)
    leaves: list[Tensor] = []
    alone = own_losses(task, expose_output(output, leaves, task.dimension, detach=True))
    nothing: list[Tensor | None] = [None] * len(leaves)
    gradient = gradients(alone.sum(), leaves, create_graph=True) if alone.requires_grad else nothing
    # With second derivatives too: single numbers are always multiples of one another.
    own, batch = _derivatives(gradient, leaves, r), _derivatives(output_gradients, points, r)
    square, dot = _products(own, own), _products(own, batch)
    factor = torch.where(square > 0, dot / square, torch.zeros_like(square))
    same = _close(own, batch, factor.abs()[:, None], factor[:, None])
    if not same or bool((factor < -rounding(factor.dtype) * factor.abs().amax()).any()):
        raise CouplingError(
            "the loss uses a statistic of the batch (perhaps detached): in some sample's output, its gradient is no "
            "positive multiple of that of the sample's loss alone, so that per-sample gradients are not what the batch "
            "does; compute the statistic beforehand and pass it in targets; hessian_diagonal stays exact."
        )
    return alone, leaves


def _holds_tensors(loss_fn: Any) -> bool:
    """Whether a loss module of PyTorch's was given weights, which may be those of classes or of samples."""
    loss_fn = getattr(loss_fn, "__wrapped__", loss_fn)
    return isinstance(loss_fn, nn.Module) and next(loss_fn.buffers(), None) is not None


def _derivatives(
    output_gradients: Sequence[Tensor | None], points: Sequence[Tensor], vectors: Sequence[Tensor] | None
) -> list[Tensor]:
    """Gradients in each output, a row a sample; with vectors, Hessian-vector products beside them."""
    found = filled(output_gradients, points)
    if vectors is not None:
        found += [u[0] for u in stacked_vjp(output_gradients, points, [v[None] for v in vectors])]
    return [as_samples(g.detach()) for g in found if g.numel()]


def _products(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Scalar products of rows."""
    return torch.stack([torch.linalg.vecdot(x, y) for x, y in zip(one, other, strict=True)]).sum(0)


def _close(found: Sequence[Tensor], expected: Sequence[Tensor], scale: Tensor, factor: Tensor | float = 1.0) -> bool:
    """Equal to rounding of each row, or of losses of size one: of a probability near one, little is left."""
    size = torch.stack([torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True) for x in expected]).amax(0)
    bound = rounding(size.dtype) * size + 16 * torch.finfo(size.dtype).eps * scale
    return all(bool(((x * factor).sub_(y).abs_() <= bound).all()) for x, y in zip(found, expected, strict=True))


def _require_invariance(
    task: Measurement, output: Any, batch: Sequence[Tensor], vectors: Sequence[Tensor] | None
) -> None:
    order = [*range(1, task.num_samples), 0]
    others = None if vectors is None else [v[order] for v in vectors]
    (permuted, targets), (_, by_rows) = task.cut(output, order), task.cut(output, order, rows=True)
    why = ""
    for exchanged in (targets, by_rows):  # a label for each token, perhaps
        leaves: list[Tensor] = []
        try:
            loss = task.loss_again(expose_output(permuted, leaves, task.dimension, detach=True), exchanged)
            again = _derivatives(gradients(loss.reshape(()), leaves, create_graph=True), leaves, others)
        except SecorderError:
            raise
        except Exception as error:
            why = f" (or none: {_first_line(error)})"
            continue
        size = torch.stack([x.abs().amax() for x in batch]).amax().clamp(max=1)
        if _close(again, [x[order] for x in batch], size):
            return
    if not torch.equal(_value(task, output, seed=1), _value(task, output)):
        raise InvalidArgumentError(
            "loss_fn draws random numbers, so that no sample has a loss of its own: draw them beforehand and pass them "
            "in targets; hessian_diagonal goes by the numbers that are drawn."
        )
    raise InvalidArgumentError(
        "loss_fn does not treat the samples of a batch alike: exchanged together with their targets, they get other "
        f"losses{why}; {HELD}."
    )


def _require_any_size(task: Measurement, output: Any) -> None:
    """Numbers of all samples meet a batch of one without an error, and multiply its loss; not one of another size."""
    if isinstance(output, torch.distributions.Distribution):  # which keeps the shape of the batch that it was made for
        return
    index = [0, 1] if task.num_samples > 2 else [0, 1, 0]
    error: Exception | None = None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in (False, True):  # several rows a sample, perhaps
            try:
                task.loss_again(*task.cut(output, index, rows=rows))
                return
            except SecorderError:
                raise
            except Exception as found:
                error = error or found
    raise InvalidArgumentError(
        f"loss_fn works on the batch and not on {len(index)} of its samples ({type(error).__name__}: "
        f"{_first_line(error)}): {HELD}."
    ) from error


def _value(task: Measurement, output: Any, seed: int | None = None) -> Tensor:
    return task.loss_again(output, task.targets, seed).detach().reshape(())
