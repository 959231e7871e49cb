"""Measurements of a whole data set: batch by batch, weighted by samples, with the standard error over batches."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from functools import wraps
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .._caution import caution
from .._torch.pytree import map_tensors, tensors_in
from .._torch.random_state import random_state_kept
from ..batch import batch_size, sample_dimension, sample_sizes
from ..errors import CurvatureWarning, InvalidArgumentError, InvalidTypeError
from ..means import RunningMean, mean_over_ranks
from ..monitor.progress import progress_bar
from ..parallel.all_reduce import raised_on_all
from ..results import Diagonals, joined_info, relative_error
from .known_losses import defined_reduction
from .loss import losses
from .trace import Trace

__all__ = [
    "MeasuresBatches",
    "alike",
    "batches_of",
    "find_reduction",
    "first_of",
    "is_data_set",
    "reduction_of",
    "takes_data_sets",
]

#: How the loss of a batch is made of its samples'.
Kind = Literal["mean", "sum"]

#: Inputs and targets, and these with the number of their samples.
Batch = tuple[Any, Any]
CountedBatch = tuple[Any, Any, int]

P = ParamSpec("P")
R = TypeVar("R")


class MeasuresBatches(Protocol):
    """What measures one batch, and knows what several need."""

    @property
    def data_context(self) -> tuple[nn.Module, int, Kind | None]:
        """The model, where samples are in its inputs, and how the loss reduces them, where that was told."""


def is_data_set(inputs: Any, targets: Any) -> bool:
    """Whether what stands in place of a batch yields batches: a DataLoader, a generator, a list of pairs.

    A structure of tensors is no data set: it is the model's arguments.

    Raises:
        InvalidTypeError: it is a data set by its type, and yields no batches.
        InvalidArgumentError: there are targets beside it.
    """
    if isinstance(inputs, Dataset) and not isinstance(inputs, Iterable):
        raise InvalidTypeError(f"a {type(inputs).__name__} yields no batches: pass torch.utils.data.DataLoader of it.")
    if targets is not None and isinstance(inputs, DataLoader):
        raise InvalidArgumentError("a DataLoader yields (inputs, targets): pass no targets beside it.")
    if isinstance(inputs, list) and targets is None and inputs:
        return all(_pair(x) for x in inputs)
    if targets is not None or isinstance(inputs, (Tensor, tuple, list, Mapping)) or not isinstance(inputs, Iterable):
        return False
    if isinstance(inputs, (Iterator, DataLoader)) or next(tensors_in(inputs), None) is None:
        return True
    first = next(iter(inputs), None)  # a loader that keeps its data in tensors, or a batch object such as a graph's
    return _pair(first)


def _pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and next(tensors_in(batch[0]), None) is not None


def batches_of(data: Iterable[Any], sample_dim: int) -> Iterator[tuple[Any, Any]]:
    """Inputs and targets, batch by batch; those without samples are left out.

    What is no pair is inputs alone, as a dict of the model's arguments, its labels among them.

    Raises:
        InvalidTypeError: the data yields something else.
    """
    for batch in data:
        inputs, targets = _inputs_and_targets(batch)
        if 0 not in sample_sizes(inputs, sample_dim):
            yield inputs, targets


def _inputs_and_targets(batch: Any) -> Batch:
    pair = isinstance(batch, (tuple, list))
    if pair and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    if not pair and next(tensors_in(batch), None) is not None:
        return batch, None
    got = f"{len(batch)} things" if pair else type(batch).__name__
    raise InvalidTypeError(f"the data must yield (inputs, targets), got {got}: wrap it in a generator that does.")


def first_of(data: Iterable[Any], sample_dim: int) -> tuple[tuple[Any, Any], int]:
    """The first batch that holds samples, and how many batches there are.

    Raises:
        InvalidArgumentError: that cannot be told, or not without using up the data.
    """
    if isinstance(data, Iterator) or not isinstance(data, Sized):
        raise InvalidArgumentError(
            f"a {type(data).__name__} does not tell how many batches it holds: pass a batch, or a DataLoader."
        )
    first = next(batches_of(data, sample_dim), None)
    if first is None:
        raise InvalidArgumentError("the data holds no batch: pass at least one sample.")
    return first, len(data)


def takes_data_sets(*, by_sample: Callable[[Mapping[str, Any]], bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a measurement of a batch take an iterable of batches in place of inputs, too.

    Args:
        by_sample: from the keywords, whether the quantity is a mean over samples whatever the loss's reduction.
    """

    def decorate(measure: Callable[P, R]) -> Callable[P, R]:
        @wraps(measure)
        def either(*args: P.args, **kwargs: P.kwargs) -> R:
            names = ("self", "loss_fn", "inputs", "targets")
            given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
            if len(args) > len(names) or not is_data_set(given.get("inputs"), given.get("targets")):
                return measure(*args, **kwargs)
            probe, loss_fn, data = (given.pop(name) for name in names[:3])
            given.pop("targets", None)
            synchronize = given.pop("synchronize", False)
            with raised_on_all() if synchronize else nullcontext(), random_state_kept(probe.data_context[0]):
                found, seen = _over(probe, measure, loss_fn, data, by_sample(given), given, errors=synchronize)
            if synchronize:
                found = mean_over_ranks(found, seen)
            result: R = found
            return result

        return either

    return decorate


def _over(
    probe: MeasuresBatches,
    measure: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    by_sample: bool,
    options: dict[str, Any],
    *,
    errors: bool,
) -> tuple[Any, int]:
    """The measurement of all batches together, with ``errors`` those of one batch too; and how many samples."""
    if options.pop("create_graph", False):
        raise InvalidArgumentError("create_graph=True is for one batch: differentiate batch by batch.")
    model, dim, told = probe.data_context
    total = len(data) if isinstance(data, Sized) else None
    running, first, sample = RunningMean([], []), None, None
    kept: list[Any] = []
    seen, kind, unknown = 0, "mean" if by_sample else None, None
    with progress_bar(options.pop("progress", False), "Data set", total, unit="batches") as advance:
        for x, t in batches_of(data, dim):
            count = batch_size(x, t, dim)
            with warnings.catch_warnings():
                if kept:  # what there is to say was said of the first
                    warnings.simplefilter("ignore", CurvatureWarning)
                found = measure(probe, loss_fn, x, t, **options)
            if sample is None:
                running, first, sample = RunningMean.like(_values(found)), found, (x, t, count)
            elif kind is None:
                try:
                    kind = reduction_of(model, loss_fn, sample, dim, told, (x, t))
                except InvalidArgumentError as error:
                    if not sample[2] == count == 1:  # of which a mean and a sum are added up in the same way
                        raise
                    unknown = error
                if kind == "sum":
                    running.mean = [m / sample[2] for m in running.mean]
            running.add([v / count for v in _values(found)] if kind == "sum" else _values(found), count)
            kept.append(found.info if isinstance(found, Diagonals) else found)
            seen += count
            advance(1)
    if first is None:
        raise InvalidArgumentError("the data holds no batch: pass at least one sample.")
    if kind is None and unknown is not None:
        raise unknown
    if len(kept) > 1 or errors:
        scale = float(seen) if kind == "sum" else 1.0
        first = _rebuilt(first, [m * scale for m in running.mean], [e * scale for e in running.standard_error], kept)
    return first, seen


def _values(found: Diagonals | dict[str, Trace]) -> list[Tensor]:
    if isinstance(found, Diagonals):
        return list(found.values())
    return [torch.tensor([trace.value for trace in found.values()], dtype=torch.float64, device="cpu")]


def _rebuilt(
    first: Diagonals | dict[str, Trace], values: list[Tensor], errors: list[Tensor], kept: list[dict[str, Any]]
) -> Any:
    """A result of the first one's kind, of all batches."""
    if isinstance(first, Diagonals):
        result = first.replaced(dict(zip(first, values, strict=True)), dict(zip(first, errors, strict=True)))
        result.info = {
            name: joined_info([infos[name] for infos in kept], relative_error([v], [e]))
            for name, v, e in zip(first, values, errors, strict=True)
        }
        return result
    numbers = zip(first, values[0].tolist(), errors[0].tolist(), strict=True)
    return {
        name: Trace(value, error, sum(k[name].num_draws for k in kept), all(k[name].converged for k in kept))
        for name, value, error in numbers
    }


def reduction_of(
    model: nn.Module, loss_fn: Any, first: CountedBatch, dim: int, told: Kind | None, following: Batch | None = None
) -> Kind:
    """As the loss's definition or its values tell, else as it was told.

    Raises:
        InvalidArgumentError: neither.
    """
    try:
        return find_reduction(model, loss_fn, first, dim, following)
    except InvalidArgumentError as error:
        if told is not None:
            if isinstance(error, NeitherMeanNorSum):
                caution(f"{NEITHER}: batches are weighted as those of a {told}, as it was told.")
            return told
        raise InvalidArgumentError(
            f"{error} Say it to the probe, or measure batch by batch and take secorder.weighted_mean of the results."
        ) from error


NEITHER = "the loss is neither a mean nor a sum over samples (they are weighted, or padded, or coupled)"


class NeitherMeanNorSum(InvalidArgumentError):
    """The loss of a batch is neither the mean nor the sum of those of its parts."""


def find_reduction(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    first: CountedBatch,
    dim: int,
    following: Batch | None = None,
) -> Kind:
    """How a loss reduces samples, by its definition, or from its value on a batch and on the batch's two parts.

    Args:
        first: inputs, targets and their number of samples.
        dim: where samples are in the inputs.
        following: another batch: where the first holds one sample, or two alike, these two are the parts of one.

    Raises:
        InvalidArgumentError: it is neither a mean nor a sum, or there is too little to tell.
    """
    inputs, targets, count = first

    def part(tree: Any, start: int, length: int) -> Any:
        def cut(tensor: Tensor) -> Tensor:
            at = sample_dimension(tensor, count, dim)
            return tensor if at is None else tensor.narrow(at, start, length)

        return map_tensors(cut, tree)

    defined = defined_reduction(loss_fn, targets)
    if defined is not None:
        return defined
    cut, both = count // 3 or count // 2, None
    if cut:
        sizes, whole = (cut, count - cut), (inputs, targets)
        both = [(part(inputs, at, n), part(targets, at, n)) for at, n in zip((0, cut), sizes, strict=True)]
    if count < 3 and following is not None and (not both or alike(*both)):
        joined = _joined((inputs, targets), following, count, dim)
        sizes, both = (count, batch_size(*following, dim)), None if joined is None else [first[:2], following]
        whole = joined or whole
    if both and not (sum(sizes) < 3 and alike(*both)):  # of one class, weights of classes do not show
        together, one, other = losses(model, loss_fn, [whole, *both])
        if torch.allclose(together, (sizes[0] * one + sizes[1] * other) / sum(sizes), rtol=1e-3):
            return "mean"
        if torch.allclose(together, one + other, rtol=1e-3):
            return "sum"
        raise NeitherMeanNorSum(f'{NEITHER}: pass reduction="mean" or "sum", by which batches are weighted.')
    raise InvalidArgumentError(
        'it cannot be told whether the loss is a mean or a sum over samples: pass reduction="mean" or "sum".'
    )


def alike(one: Batch, other: Batch) -> bool:
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
