"""Measurements of a whole data set: batch by batch, weighted by samples, with the standard error over batches."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .._arguments import require_flag
from .._torch.pytree import tensors_in
from .._torch.random_state import random_state_kept
from ..batch import NO_BATCH, batch_size, sample_sizes
from ..errors import CurvatureWarning, InvalidArgumentError, InvalidTypeError
from ..means import RunningMean, mean_over_ranks
from ..monitor.progress import progress_bar
from ..parallel.all_reduce import raised_on_all
from ..results import Diagonals, joined_info, relative_error
from .loss_reduction import Kind, LossReduction
from .timing import SHORT_SECONDS, least_seconds_of, seconds_of
from .trace import Trace
from .warn import warn_if_not_finite

P = ParamSpec("P")
R = TypeVar("R")


class MeasuresBatches(Protocol):
    """What measures one batch, and knows what several need."""

    @property
    def _data_context(self) -> tuple[nn.Module, int, Kind | None]:
        """The model, where samples are in its inputs, and how the loss reduces them, where that was told."""


def is_data_set(inputs: Any, targets: Any) -> bool:
    """Whether what stands in place of a batch yields batches: a DataLoader, a generator, a list of pairs or dicts.

    A structure of tensors is no data set: it is the model's arguments. Raises for a data set that yields no batches,
    and for one with targets beside it.
    """
    if isinstance(inputs, Dataset) and not isinstance(inputs, Iterable):
        raise InvalidTypeError(f"a {type(inputs).__name__} yields no batches: pass torch.utils.data.DataLoader of it.")
    if targets is not None and isinstance(inputs, (DataLoader, Iterator)):
        raise InvalidArgumentError(f"a {type(inputs).__name__} yields (inputs, targets): pass no targets beside it.")
    if isinstance(inputs, list) and targets is None and inputs:
        return all(_pair(x) for x in inputs) or all(_arguments(x) for x in inputs)
    if targets is not None or isinstance(inputs, (Tensor, tuple, list, Mapping)) or not isinstance(inputs, Iterable):
        return False
    if isinstance(inputs, (Iterator, DataLoader)) or next(tensors_in(inputs), None) is None:
        return True
    first = next(iter(inputs), None)  # a loader that keeps its data in tensors, or a batch object such as a graph's
    return _pair(first)


def require_one_batch(method: str, inputs: Any, targets: Any) -> None:
    """Raise where a method of the probe that measures one batch is given a data set."""
    if is_data_set(inputs, targets):
        raise InvalidTypeError(f"{method}() takes one batch: pass its inputs and targets, such as *next(iter(loader)).")


def _pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and next(tensors_in(batch[0]), None) is not None


def _arguments(batch: Any) -> bool:
    """Whether a batch is a dict of the model's arguments, by name."""
    return isinstance(batch, Mapping) and next(tensors_in(batch), None) is not None


def batches_of(data: Iterable[Any], sample_dim: int) -> Iterator[tuple[Any, Any]]:
    """Inputs and targets, batch by batch; those without samples are left out.

    What is no pair is inputs alone, as a dict of the model's arguments, its labels among them.
    """
    for batch in data:
        inputs, targets = inputs_and_targets(batch)
        if 0 not in sample_sizes(inputs, sample_dim):
            yield inputs, targets


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Those of a batch of a data set."""
    pair = isinstance(batch, (tuple, list))
    if pair and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    if not pair and next(tensors_in(batch), None) is not None:
        return batch, None
    got = f"{len(batch)} things" if pair else type(batch).__name__
    raise InvalidTypeError(f"the data must yield (inputs, targets), got {got}: wrap it in a generator that does.")


def first_of(data: Iterable[Any], sample_dim: int) -> tuple[tuple[Any, Any], int, float]:
    """The first batch that holds samples, how many batches there are, and the seconds that it takes to get the next."""
    number = None if isinstance(data, Iterator) else number_of_batches(data)
    if number is None:
        raise InvalidArgumentError(
            f"a {type(data).__name__} has no length, so the number of batches is unknown: pass a batch, or a loader "
            "with a length."
        )
    batches = batches_of(data, sample_dim)
    first = next(batches, None)
    if first is None:
        raise InvalidArgumentError(NO_BATCH)
    return first, number, seconds_of(lambda: next(batches, None))


def seconds_besides(measure: Callable[[list[Any]], object], batch: tuple[Any, Any], told: float) -> float:
    """What a batch takes in a data set besides the seconds that were told, where these are so few that it matters."""
    if told > SHORT_SECONDS:
        return 0.0
    measure([batch])  # what happens the first time alone
    return max(0.0, least_seconds_of(lambda: measure([batch] * 2)) / 2 - told)


def number_of_batches(data: Any) -> int | None:
    """How many batches there are, where the data tells: a loader of a stream has a length by its type alone."""
    try:
        return len(data)
    except TypeError:
        return None


def takes_data_sets(*, by_sample: Callable[[Mapping[str, Any]], bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a measurement of a batch take an iterable of batches in place of inputs, too.

    ``by_sample`` tells from the keywords whether the quantity is a mean over samples whatever the loss's reduction.
    """

    def decorate(measure: Callable[P, R]) -> Callable[P, R]:
        @wraps(measure)
        def either(*args: P.args, **kwargs: P.kwargs) -> R:
            names = ("self", "loss_fn", "inputs", "targets")
            given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
            if len(args) > len(names) or not is_data_set(given.get("inputs"), given.get("targets")):
                return measure(*args, **kwargs)
            require_flag("progress", given.get("progress", False))
            probe, loss_fn, data = (given.pop(name) for name in names[:3])
            given.pop("targets", None)
            synchronize = given.pop("synchronize", False)
            with raised_on_all() if synchronize else nullcontext(), random_state_kept(probe._data_context[0]):
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
    model, dim, told = probe._data_context
    total = number_of_batches(data)
    running, first = RunningMean([], []), None
    kept: list[Any] = []
    seen, reduction = 0, LossReduction(model, loss_fn, dim, told, "mean" if by_sample else None)
    with progress_bar(options.pop("progress", False), "Data set", total, unit="batches") as advance:
        for x, t in batches_of(data, dim):
            count = batch_size(x, t, dim)
            with warnings.catch_warnings():
                if kept:  # what there is to say was said of the first
                    warnings.simplefilter("ignore", CurvatureWarning)
                found = measure(probe, loss_fn, x, t, **options)
            if first is None:
                running, first = RunningMean.like(_values(found)), found
            elif isinstance(first, Diagonals):  # of several, the form of the first is all that is kept
                first = first.replaced({name: v.new_empty(0) for name, v in first.items()})
            before = reduction.add_batch(x, t, count)
            running.mean = [m / before for m in running.mean] if before > 1 else running.mean
            running.add([v / count for v in _values(found)] if reduction.summed else _values(found), count)
            kept.append(found.info if isinstance(found, Diagonals) else found)
            del found  # which the next batch would be measured beside
            seen += count
            advance(1)
    if first is None:
        raise InvalidArgumentError(NO_BATCH)
    reduction.require()
    if len(kept) > 1 or errors:
        scale = float(seen) if reduction.summed else 1.0
        own = [e.mul_(scale) for e in running.standard_error]
        first = _rebuilt(first, [m.mul_(scale) for m in running.mean], own, kept)
        warn_if_not_finite(first, "mean over the batches")  # of which the first may have been finite
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
