"""The losses of samples taken alone, ℓ_n, and the checks that the batch's loss is made of them.

A loss of samples does not change when samples are exchanged, outputs together with targets; and its gradient in one
sample's output is c_n times that of ℓ_n. Where it holds tensors of the batch itself (weights, a teacher's outputs) the
first does not hold, and a batch of one would meet the weights of all; where it takes statistics of the batch, however
detached, the second does not.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._torch.cross_entropy import is_cross_entropy_of_rows
from .._torch.failures import is_out_of_memory, is_vmap_failure
from .._torch.graph import least_precise
from .._torch.pytree import map_tensors, tensors_in
from .._torch.vjp import chunks, default_chunk_size, gradients, stacked_vjp
from ..errors import CouplingError, InvalidArgumentError, NonFiniteError, SecorderError
from ..layers.dtypes import rounding
from .known_losses import made_of_samples
from .measurement import Measurement
from .output_hessian import as_samples, expose_output, filled

#: What to do about a loss that holds what belongs to the samples.
HELD = (
    "if it holds tensors of the batch itself (weights, a teacher's outputs, targets in a closure), pass them in "
    "targets, for example as a tuple: targets=(y, weights)"
)

#: Parts that the samples are taken in at most, where outputs are wide: each takes a pass over all outputs.
MOST_PARTS = 4


@dataclass(eq=False)
class BatchLoss:
    """The loss of the batch as a function of leaves that stand for the model's output."""

    loss: Tensor  #: its value
    points: list[Tensor]  #: the leaves, samples in dim 0
    output: Any  #: the output that is made of them
    gradients: list[Tensor | None] = field(default_factory=list)  #: of the loss in the points, differentiable
    kind: torch.dtype = field(init=False)  #: the least precise dtype that the loss was computed in

    def __post_init__(self) -> None:
        """Take the gradients."""
        self.kind = least_precise([self.loss])
        self.gradients = gradients(self.loss, self.points, create_graph=True)

    def release(self) -> None:
        """Keep the values of loss and gradients, and not the graph, which is several times as large as the output."""
        self.loss = self.loss.detach()
        self.gradients = [None if g is None else g.detach() for g in self.gradients]


def own_losses(task: Measurement, output: Any, ids: range | None = None) -> Tensor:
    """ℓ_n, shape (N,): the loss of batches of one, each made of one sample's output and target.

    All of them in one call of the loss where vmap runs it; of a loss that nobody knows, where it has written nothing
    that it holds, and the last sample alone gets the same. Raises where the loss fails on a sample alone, or is not
    finite.
    """
    losses = None
    ids = range(task.num_samples) if ids is None else ids
    many = task.num_samples > 2 and _in_tensors((output, task.targets, ()), task.num_samples)
    if not task.autocast and (task.known_loss or (many and not task.isolated.loss_writes())):
        losses = _by_vmap(task, output, ids)
        if losses is not None and not task.known_loss:
            last = _one(task, output, ids[-1]).detach()
            bound = rounding(losses.dtype) * losses.detach().abs().amax()
            if task.isolated.loss_writes() or not bool((losses[-1].detach() - last).abs() <= bound):
                losses = None
    if losses is None:
        losses = torch.stack([_one(task, output, n) for n in ids])
    finite = losses.detach().isfinite()
    if not bool(finite.all()):
        n = int(finite.logical_not().nonzero()[0])
        raise NonFiniteError(
            f"the loss of sample {ids[n]} taken alone is {losses[n].item()}, though that of the batch is finite: it "
            "divides by what only a batch has (a standard deviation, the number of labels that count), so that there "
            "is no per-sample gradient; compute such statistics beforehand and pass them in targets, or leave the "
            "sample out."
        )
    return losses


def _in_tensors(tree: Any, count: int) -> bool:
    """Whether output or targets are tensors in plain containers, none of which may have an entry for each sample."""
    if type(tree) is dict:
        tree = tuple(tree.values())
    if type(tree) in (tuple, list):
        return len(tree) != count and all(_in_tensors(x, count) for x in tree)
    return tree is None or (isinstance(tree, Tensor) and tree.layout == torch.strided)


def _by_vmap(task: Measurement, output: Any, ids: range) -> Tensor | None:
    """All at once, or None where vmap cannot run the loss."""
    placed = [(t, dim) for t in tensors_in((output, task.targets)) if (dim := task.dimension(t)) is not None]
    per_sample = [t.narrow(dim, ids.start, len(ids)) for t, dim in placed]
    kept = [dim for _, dim in placed]

    def one(*samples: Tensor) -> Tensor:
        rest = iter(zip(samples, kept, strict=True))

        def alone(tensor: Tensor) -> Tensor:
            if task.dimension(tensor) is None:
                return tensor
            sample, dim = next(rest)
            return sample.unsqueeze(dim)

        return task.loss_again(*map_tensors(alone, (output, task.targets))).reshape(())

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.vmap(one, in_dims=tuple(kept))(*per_sample)
    except RuntimeError as error:  # an operator without a batching rule
        if is_out_of_memory(error) or (task.known_loss and not is_vmap_failure(error)):
            raise
    except Exception as error:  # a target of several rows a sample; what a loss of the user's is not written for
        if task.known_loss and not isinstance(error, (ValueError, IndexError)):
            raise
    return None


def _one(task: Measurement, output: Any, n: int) -> Tensor:
    """The loss of sample n alone; where that fails, with targets of several rows a sample cut into as many parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a batch of one, such as that it has no standard deviation
        try:
            return task.loss_again(*task.cut(output, [n])).reshape(())
        except SecorderError:
            raise
        except Exception as error:
            try:
                return task.loss_again(*task.cut(output, [n], rows=True)).reshape(())
            except Exception:
                raise InvalidArgumentError(
                    f"loss_fn works on the batch and fails on sample {n} alone ({type(error).__name__}: "
                    f"{_first_line(error)}): {HELD}."
                ) from error


def _first_line(error: Exception | None) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def own_gradients(task: Measurement, batch: BatchLoss, *, second_order: bool) -> list[Tensor | None]:
    """The gradient of Σ_n ℓ_n in the batch's points, once it is known that the batch's loss is made of the ℓ_n.

    For second order it is differentiable, and second derivatives, too, must be unchanged when samples are exchanged.
    Raises where samples that are exchanged together with their targets get other losses, and where gradients of the
    losses alone are no multiples of the batch's (:class:`CouplingError`).
    """
    points = batch.points
    if task.num_samples == 1 or made_of_samples(task.loss_fn, batch.output, task.targets):
        batch.release()
        return gradients(own_losses(task, batch.output).sum(), points, create_graph=second_order)
    vectors = _vectors(points, task.generator)
    whole = _derivatives(batch.gradients, points, vectors)
    batch.release()
    first = whole[: len(whole) // 2]
    _require_invariance(task, batch, whole if second_order else first, vectors if second_order else None)
    _require_any_size(task, batch.output)
    found: list[Tensor | None] = []
    factors = []
    parts = _parts(task, points)
    for ids in parts:
        of_part = gradients(own_losses(task, batch.output, ids).sum(), points, create_graph=True)
        factors.append(_multiples(_derivatives(of_part, points, vectors), whole, ids, batch.kind))
        if len(parts) == 1:
            found = of_part
        elif not second_order:
            found = _sums(found, of_part)
        del of_part
    factor = torch.cat(factors)
    if bool(factor.isnan().any() | (factor < -rounding(factor.dtype) * factor.abs().amax()).any()):
        raise CouplingError(
            "the loss uses a statistic of the batch (perhaps detached): in some sample's output, its gradient is no "
            "positive multiple of that of the sample's loss alone, so that per-sample gradients are not what the batch "
            "does; compute the statistic beforehand and pass it in targets; hessian_diagonal stays exact."
        )
    if not second_order:
        return [None if g is None else g.detach() for g in found]
    del whole, first
    return found or gradients(own_losses(task, batch.output).sum(), points, create_graph=True)


def gradients_of_rows(task: Measurement, batch: BatchLoss) -> list[Tensor | None] | None:
    """:func:`own_gradients` of a loss that its graph shows to be a cross entropy of rows of the output, else None.

    It couples no samples and weighs them by no output, so that first derivatives tell whether it is made of the ℓ_n.
    The batch's loss is released where it is such a one.
    """
    (point, *others), count = batch.points, task.num_samples
    if others or count == 1 or not is_cross_entropy_of_rows(batch.loss, point):
        return None
    batch.release()
    whole, found = _derivatives(batch.gradients, [point], None), list[Tensor | None]()
    for ids in _parts(task, [point]):
        try:
            losses = own_losses(task, batch.output, ids)
        except SecorderError:
            return None
        of_part = gradients(losses.sum(), [point])
        own = _derivatives(of_part, [point], None)
        counts = own[0][ids.start : ids.stop].any(1)  # a sample that its own loss depends on is in the batch's, too
        factor = _multiples(own, whole, ids, batch.kind)
        if not bool(torch.where(counts, factor > 0, factor == 0).all()):
            return None
        found = _sums(found, of_part)
    return found


def _parts(task: Measurement, points: Sequence[Tensor]) -> list[range]:
    """The samples, a few at a time where outputs are wide: what is kept for derivatives is several copies of them."""
    few = default_chunk_size(sum(x[0].numel() for x in points), points[0], None)
    return list(chunks(task.num_samples, max(few, -(-task.num_samples // MOST_PARTS))))


def _multiples(own: Sequence[Tensor], whole: Sequence[Tensor], ids: range, kind: torch.dtype) -> Tensor:
    """By which numbers rows of the batch's derivatives are multiples of the samples' own; nan where one is none.

    With second derivatives too: single numbers are always multiples of one another.
    """
    own, whole = ([x[ids.start : ids.stop] for x in every] for every in (own, whole))
    factor, sizes = _ratio(own, whole), [_largest(x) for x in (own, whole)]
    least, most = (bound**0.25 for bound in (torch.finfo(factor.dtype).tiny, torch.finfo(factor.dtype).max))
    far = torch.stack([(size < least) | (size > most) for size in sizes]).any(0)  # products might not be held
    if bool(far.any()):
        own_size, size = (x[far].clamp(min=torch.finfo(x.dtype).tiny) for x in sizes)
        scaled = ([x[far] / by[:, None] for x in rows] for rows, by in ((own, own_size), (whole, size)))
        factor[far] = _ratio(*scaled) * (size / own_size)
    alike = _close(own, whole, factor.abs()[:, None], kind, factor[:, None])
    return factor if alike else factor.fill_(torch.nan)


def _ratio(own: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
    """What each row has to be multiplied by to be nearest to another one."""
    square, dot = _products(own, own), _products(own, whole)
    return torch.where(square > 0, dot / square, torch.zeros_like(square))


def _largest(rows: Sequence[Tensor]) -> Tensor:
    """The largest entry of each row: twenty times as fast as the norm, and no copy of what may be wide."""
    return torch.stack([torch.maximum(x.amax(1), x.amin(1).neg()) for x in rows]).amax(0)


def _sums(before: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums of gradients, as they are without those of further samples where there are none."""
    if not before:
        return [None if g is None else g.detach() for g in more]
    return [
        b if g is None else g.detach() if b is None else b.add_(g.detach()) for b, g in zip(before, more, strict=True)
    ]


def _vectors(points: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random ones, the same for each sample, so that they take no memory: that no two samples interact is known."""
    device = generator.device
    return [torch.randn(x.shape[1:], generator=generator, device=device).to(x).expand(x.shape) for x in points]


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


def _close(
    found: Sequence[Tensor], expected: Sequence[Tensor], scale: Tensor, kind: torch.dtype, factor: Tensor | float = 1.0
) -> bool:
    """Equal to rounding of each row, or of losses of size one: of a probability near one, little is left."""
    size = _largest(expected)[:, None]
    bound = rounding(kind) * size + 16 * torch.finfo(kind).eps * scale
    return all(bool(((x * factor).sub_(y).abs_() <= bound).all()) for x, y in zip(found, expected, strict=True))


def _require_invariance(
    task: Measurement, batch: BatchLoss, whole: Sequence[Tensor], vectors: Sequence[Tensor] | None
) -> None:
    order = [*range(1, task.num_samples), 0]
    why = ""
    for rows in (False, True):  # a label for each token, perhaps
        try:
            again = _exchanged(task, batch.output, order, rows, vectors)
        except SecorderError:
            raise
        except Exception as error:
            why = f" (or none: {_first_line(error)})"
            continue
        size = torch.stack([x.abs().amax() for x in whole]).amax().clamp(max=1)
        ends = (slice(1, None), slice(None, -1)), (slice(1), slice(-1, None))  # as the order has it, without a copy
        pairs = [([x[found] for x in again], [x[here] for x in whole]) for here, found in ends]
        if all(_close(found, here, size, batch.kind) for found, here in pairs):
            return
    first, other = (task.loss_again(batch.output, task.targets, seed).detach() for seed in (1, None))
    if not torch.equal(first, other):
        raise InvalidArgumentError(
            "loss_fn draws random numbers, so that no sample has a loss of its own: draw them beforehand and pass them "
            "in targets; hessian_diagonal takes the numbers that are drawn."
        )
    raise InvalidArgumentError(
        "loss_fn does not treat the samples of a batch alike: exchanged together with their targets, they get other "
        f"losses{why}; {HELD}."
    )


def _exchanged(
    task: Measurement, output: Any, order: list[int], rows: bool, vectors: Sequence[Tensor] | None
) -> list[Tensor]:
    """The derivatives of the loss of samples in another order, in that order."""
    permuted, targets = task.cut(output, order)
    if rows:
        _, targets = task.cut(output, order, rows=True)
    exposed, leaves = expose_output(permuted, task.dimension, detach=True)
    del permuted
    loss = task.loss_again(exposed, targets).reshape(())
    del exposed, targets
    found = gradients(loss, leaves, create_graph=vectors is not None)
    return _derivatives(found, leaves, vectors)


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
