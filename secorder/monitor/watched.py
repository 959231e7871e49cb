"""What a recorder needs of the probe that it watches."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, get_origin

from torch import Tensor

from .._arguments import (
    like,
    refuse_unused_draws,
    require_callable,
    require_flag,
    require_integer,
    require_number,
    require_one_of,
    shown,
)
from .._keywords import refuse_renamed
from ..errors import InvalidArgumentError, InvalidTypeError


class Watched(Protocol):
    """What is needed of a :class:`secorder.CurvatureProbe`."""

    @property
    def decay(self) -> float | None:
        """Of the moving average; None for means."""

    @property
    def every(self) -> int:
        """Each how many forwards are recorded."""

    @property
    def accumulate(self) -> str:
        """What is accumulated, ``"diagonal"`` or ``"trace"``."""

    @property
    def num_samples(self) -> int:
        """How many samples it tells of."""

    @property
    def layer_parameters(self) -> Mapping[str, Sequence[Tensor]]:
        """Layer name → parameters."""

    @property
    def window(self) -> Callable[..., Any]:
        """The method that takes out what was accumulated since it was called last."""

    @property
    def synchronize(self) -> Callable[..., Any]:
        """The method that puts together what all ranks accumulated."""

    @property
    def hessian_diagonal(self) -> Callable[..., Any]:
        """The method that measures the Hessian diagonal per layer."""

    @property
    def hessian_trace(self) -> Callable[..., Any]:
        """The method that measures its trace."""

    @property
    def hessian_eigenvalues(self) -> Callable[..., Any]:
        """The method that measures extreme eigenvalues."""


def measurement_options(probe: Watched, given: Mapping[str, Any], own: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For each measurement of a probe, those of the given keywords that it takes, beside the recorder's own.

    Refuses a keyword that had another name, that no measurement takes, or that none knows.
    """
    if not hasattr(probe, "window") or isinstance(probe, type):
        raise InvalidTypeError(
            f"probe must be a CurvatureProbe, got {type(probe).__name__}: pass CurvatureProbe(model)."
        )
    refuse_renamed(given, "hessian_diagonal()")
    methods = ("hessian_diagonal", "hessian_trace", "hessian_eigenvalues")
    taken = {method: inspect.signature(getattr(probe, method)).parameters for method in methods}
    if "every" in given:
        raise InvalidArgumentError("CurvatureRecorder takes log_every= in place of every=.")
    unknown = sorted(given.keys() - set().union(*taken.values()))
    if unknown:
        raise InvalidArgumentError(
            f"there is no option {unknown[0]!r}{like(unknown[0], {*own, *set().union(*taken.values())})}"
        )
    options = {method: {key: value for key, value in given.items() if key in taken[method]} for method in methods}
    for method, chosen in options.items():
        for key, value in chosen.items():
            _check_option(key, value, taken[method][key].annotation)  # now, not at the first step that measures
    drawn = ("num_draws", "rtol", "max_draws", "max_hvps")
    refuse_unused_draws(given.get("method", "auto"), **{key: given[key] for key in drawn if key in given})
    return options


def _check_option(name: str, value: Any, annotation: Any) -> None:
    """Refuse what is none of an option's words, no number of its kind, or below zero."""
    kinds = get_args(annotation) or (annotation,)
    if get_origin(annotation) is Literal:
        require_one_of(name, value, kinds)
    elif value is not None and int in kinds:
        require_integer(name, value, 0)
    elif value is not None and float in kinds:
        require_number(name, value, zero=True)


def check_flags(**flags: Any) -> None:
    """Refuse what is neither True nor False."""
    for name, flag in flags.items():
        require_flag(name, flag)


def check_intervals(every: Mapping[str, int | None]) -> None:
    """Refuse what is no interval."""
    for name, interval in every.items():
        if interval is not None:
            require_integer("log_every" if name == "fisher" else f"{name}_every", interval, 1)


def check_measured(every: Mapping[str, int | None], loss_fn: Any, batch: Any) -> None:
    """Refuse what cannot be measured on: a missing loss or batch, what is no function, or no pair."""
    measured = [name for name in ("hessian", "traces", "eigenvalues") if every[name] is not None]
    if measured and (loss_fn is None or batch is None):
        raise InvalidArgumentError(f"{measured[0]}_every needs loss_fn= and batch=(inputs, targets) to measure on.")
    if loss_fn is not None:
        require_callable("loss_fn", loss_fn, "loss_fn(outputs, targets)")
    if batch is not None and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise InvalidTypeError(f"batch must be a pair (inputs, targets), got {type(batch).__name__}.")


def check_listeners(optimizer: Any, on_finding: Any) -> None:
    """Refuse what is no optimizer, or cannot be called."""
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise InvalidTypeError(f"optimizer must have param_groups, as torch.optim's have, got {shown(optimizer)}.")
    if on_finding is not None:
        require_callable("on_finding", on_finding, "on_finding(change)")
