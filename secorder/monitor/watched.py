"""What a recorder needs of the probe that it watches."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .._arguments import shown
from .._keywords import refuse_renamed
from ..errors import InvalidArgumentError, InvalidTypeError

__all__ = ["Watched", "check_intervals", "check_measured", "measurement_options"]


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
        """The method that takes out what was accumulated since the last look."""

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


def measurement_options(probe: Watched, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each measurement of a probe, those of the given keywords that it takes.

    Raises:
        InvalidArgumentError: one had another name, or no measurement takes it.
        InvalidTypeError: it is no probe.
    """
    if not hasattr(probe, "window"):
        raise InvalidTypeError(f"a recorder watches a probe, got {type(probe).__name__}: pass CurvatureProbe(model).")
    refuse_renamed(given, "hessian_diagonal()")
    methods = ("hessian_diagonal", "hessian_trace", "hessian_eigenvalues")
    taken = {method: set(inspect.signature(getattr(probe, method)).parameters) for method in methods}
    if "every" in given:
        raise InvalidArgumentError("CurvatureRecorder takes log_every= in place of every=.")
    unknown = sorted(given.keys() - set.union(*taken.values()))
    if unknown:
        raise InvalidArgumentError(f"CurvatureRecorder has no option {unknown[0]!r}, and neither has a measurement.")
    return {method: {key: value for key, value in given.items() if key in taken[method]} for method in methods}


def check_intervals(every: Mapping[str, int | None]) -> None:
    """Refuse what is no interval.

    Raises:
        InvalidArgumentError: one is no whole number, or below 1.
    """
    for name, interval in every.items():
        whole = isinstance(interval, int) and not isinstance(interval, bool)
        if interval is not None and not (whole and interval >= 1):
            keyword = "log_every" if name == "fisher" else f"{name}_every"
            raise InvalidArgumentError(
                f"{keyword} must be a whole number of steps of at least 1, got {shown(interval)}."
            )


def check_measured(measured: Sequence[str], loss_fn: Any, batch: Any) -> None:
    """Refuse what cannot be measured on.

    Raises:
        InvalidArgumentError: a loss or a batch is missing.
        InvalidTypeError: the loss is no function, or the batch no pair.
    """
    if measured and (loss_fn is None or batch is None):
        raise InvalidArgumentError(f"{measured[0]}_every needs loss_fn= and batch=(inputs, targets) to measure on.")
    if loss_fn is not None and (isinstance(loss_fn, type) or not callable(loss_fn)):
        raise InvalidTypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got {shown(loss_fn)}.")
    if batch is not None and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise InvalidTypeError(f"batch must be a pair (inputs, targets), got {type(batch).__name__}.")
