"""Whether a loss is a mean or a sum over the samples of its batch, which decides how batches make up a data set."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._caution import caution
from .._torch.pytree import map_tensors, tensors_in
from .._torch.vjp import gradients
from ..batch import batch_size, owned_batch, part_of_batch, sample_dimension, take_samples
from ..errors import InvalidArgumentError
from ..layers.selection import parameters_of, select_layers
from .independence import without_gradients
from .isolation import isolate
from .known_losses import defined_reduction
from .loss import LossAndGradient, check_loss, losses_and_gradients
from .overwriting import on_copies

#: How the loss of a batch is made of its samples'.
Kind = Literal["mean", "sum"]

#: Inputs and targets, and these with the number of their samples.
Batch = tuple[Any, Any]
CountedBatch = tuple[Any, Any, int]

ADVICE = (
    'pass reduction="mean" or "sum", by which batches are weighted, to the probe (or to diagnose), or measure batch by '
    "batch and take secorder.weighted_mean of the results."
)

NEITHER = "the loss is neither a mean nor a sum over samples (they are weighted, or padded, or coupled)"


class NeitherMeanNorSum(InvalidArgumentError):
    """The loss of a batch is neither the mean nor the sum of those of its parts."""


class LossReduction:
    """How a loss reduces the samples of the batches of a data set, of which each is looked at: padding may come late.

    ``kind`` is what was found so far, None before the second batch, without which it does not matter. What is
    ``specified`` for the training's loss counts where nothing tells of this one; what is ``certain`` is not asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        dim: int,
        specified: Kind | None = None,
        certain: Kind | None = None,
    ) -> None:
        self.kind = certain
        self._model, self._loss_fn, self._dim, self._specified = model, loss_fn, dim, specified
        self._certain = certain is not None
        self._first: CountedBatch | None = None
        self._unknown: InvalidArgumentError | None = None

    @property
    def summed(self) -> bool:
        """Whether it is a sum."""
        return self.kind == "sum"

    def add_batch(self, inputs: Any, targets: Any, count: int) -> int:
        """Another batch.

        Returns what to divide by what was added up so far, as of means over samples: of sums, the first batch's
        samples.
        """
        if self._certain:
            return 1
        found = None
        if self._first is None:
            self._first = inputs, targets, count
        elif self.kind is None:
            try:
                found = self.kind = self._found(self._first, (inputs, targets))
            except InvalidArgumentError as error:
                if not self._first[2] == count == 1:  # of which a mean and a sum are added up in the same way
                    raise
                self._unknown = error
        if self.kind is not None and self._specified is None:
            self._confirm((inputs, targets, count))
        return self._first[2] if found == "sum" else 1

    def require(self) -> None:
        """After the last batch, raise where there was too little to tell."""
        if self.kind is None and self._unknown is not None:
            raise self._unknown

    def _found(self, first: CountedBatch, following: Batch) -> Kind:
        """As the loss's definition or its values tell, else as it was told."""
        try:
            return self._reduction(first, following)
        except InvalidArgumentError as error:
            if self._specified is not None:
                if isinstance(error, NeitherMeanNorSum):
                    caution(f"{NEITHER}: batches are weighted as those of a {self._specified}, as specified.")
                return self._specified
            raise

    def _confirm(self, batch: CountedBatch) -> None:
        try:
            found = self._reduction(batch)
        except NeitherMeanNorSum:
            raise
        except InvalidArgumentError:  # too few samples
            return
        if found != self.kind:
            raise NeitherMeanNorSum(f"{NEITHER}: {ADVICE}")

    def _reduction(self, first: CountedBatch, following: Batch | None = None) -> Kind:
        """By the loss's definition, or from a batch and the batch's two parts.

        Where the first batch holds one sample, or two alike, it and the following one are the parts of one.
        """
        inputs, targets, count = first
        defined = defined_reduction(self._loss_fn, targets)
        if defined is not None:
            return defined
        dim, cut, both = self._dim, count // 3 or count // 2, None
        if cut:
            sizes, whole = (cut, count - cut), (inputs, targets)
            parts, owned = (range(cut), range(cut, count)), owned_batch(inputs, targets, dim)
            both = [part_of_batch(inputs, targets, count, dim, part, owned=owned) for part in parts]
        if count < 3 and following is not None and (not both or _alike(*both)):
            joined = _joined((inputs, targets), following, count, dim)
            sizes, both = (count, batch_size(*following, dim)), None if joined is None else [first[:2], following]
            whole = joined or whole
        if both and not (sum(sizes) < 3 and _alike(*both)):  # of one class, weights of classes do not show
            found = self._of_parts(whole, both, sizes)
            if found is not None:
                return found
        raise InvalidArgumentError(
            f"it cannot be determined whether the loss is a mean or a sum over samples: {ADVICE}"
        )

    def _of_parts(self, whole: Batch, both: list[Batch], sizes: tuple[int, int]) -> Kind | None:
        """Whether loss and gradient of a batch are the mean or sum of those of its parts; None if nothing tells."""
        ways: list[Callable[[], list[LossAndGradient] | None]] = [partial(self._by_output, whole, sizes)]
        # In evaluation mode where training mode says neither: dropout and statistics of the batch are not the loss's.
        for evaluation in (False, True) if any(m.training for m in self._model.modules()) else (False,):
            batches = [whole, *both]
            ways.append(partial(losses_and_gradients, self._model, self._loss_fn, batches, evaluation=evaluation))
        ran = False
        for way in ways:
            try:
                found = way()
            except Exception:  # of parts: the whole was measured
                continue
            if found is None:
                continue
            ran, kinds = True, _kinds(found, sizes)
            if kinds:
                return kinds[0] if len(kinds) == 1 else None
            if way is ways[0]:
                break
        if not ran:
            return None
        raise NeitherMeanNorSum(f"{NEITHER}: {ADVICE}")

    def _by_output(self, whole: Batch, sizes: tuple[int, int]) -> list[LossAndGradient] | None:
        """The losses of a batch and its two parts, and their gradients in the model's output on the batch.

        None where the loss goes by more than that, or it is not known whose all of the output is.
        """
        model, dim, (inputs, targets), count = self._model, self._dim, whole, sum(sizes)
        rows = any(t.dim() and t.shape[0] > count for t in tensors_in(targets))
        with isolate(model, self._loss_fn, select_layers(model, "all", unchecked=True), direct=True) as isolated:
            replacements = [isolated.replacement(p) for p in parameters_of(model)]
            output = map_tensors(torch.detach, without_gradients(isolated.forward, inputs))
            points = [t.requires_grad_() for t in tensors_in(output) if t.is_floating_point()]
            places = [sample_dimension(t, count, dim) for t in points]
            if not places or None in places:
                return None
            found: list[LossAndGradient] = []
            for index in (range(count), range(sizes[0]), range(sizes[0], count)):
                (part,) = take_samples([output], index, count, dim)
                (own,) = take_samples([targets], index, count, dim, rows=rows)
                with isolated.loss_once_more() if found else nullcontext():
                    loss = check_loss(on_copies(self._loss_fn)(part, own), isolated, inputs)
                if not loss.requires_grad or any(g is not None for g in gradients(loss, replacements)):
                    return None
                found.append(LossAndGradient.of(loss, points))
        return found


def _kinds(found: Sequence[LossAndGradient], sizes: tuple[int, int]) -> list[Kind]:
    """What the batch, the first of these, may be of its parts."""
    weights: dict[Kind, tuple[float, float]] = {
        "mean": (sizes[0] / sum(sizes), sizes[1] / sum(sizes)),
        "sum": (1.0, 1.0),
    }
    return [kind for kind, of_parts in weights.items() if _is_combination(found[0], found[1:], of_parts)]


def _is_combination(whole: LossAndGradient, parts: Sequence[LossAndGradient], weights: Sequence[float]) -> bool:
    """Whether loss and gradient of the whole are those of its parts, weighted and added up.

    Losses alone would not tell: those of an untrained model are nearly the same for all samples.
    """
    eps = torch.finfo(whole.kind).eps
    losses = torch.stack([w * part.loss for w, part in zip(weights, parts, strict=True)])
    near = torch.allclose(whole.loss, losses.sum(0), rtol=max(1e-3, 4 * eps))
    difference, size = 0.0, 0.0
    for total, *of_parts in zip(whole.gradient, *(part.gradient for part in parts), strict=True):
        terms = [w * g.double() for w, g in zip(weights, of_parts, strict=True)]
        rounding = max(eps, torch.finfo(total.dtype).eps) ** 0.5
        difference += float((total - sum(terms)).norm()) ** 2
        size += (rounding * sum(float(t.norm()) for t in terms)) ** 2
    return near and difference <= size


def _alike(one: Batch, other: Batch) -> bool:
    """Whether targets are the same."""
    pairs = list(zip(tensors_in(one[1]), tensors_in(other[1]), strict=False))
    return bool(pairs) and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _joined(one: Batch, other: Batch, count: int, dim: int) -> Batch | None:
    """Two batches in one; None where their tensors are not of one shape but for the samples."""
    rest = tensors_in(other)

    def cat(tensor: Tensor) -> Tensor:
        at = sample_dimension(tensor, count, dim)
        following = next(rest)
        return tensor if at is None else torch.cat([tensor, following], at)

    try:
        joined: Batch = map_tensors(cat, one)
    except (RuntimeError, StopIteration, IndexError):
        return None
    return joined
