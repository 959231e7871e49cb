"""What is needed of a probe that a recorder watches."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .._keywords import refuse_renamed
from ..errors import InvalidArgumentError

__all__ = ["Watched", "measurement_options"]


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
    """
    refuse_renamed(given, "hessian_diagonal()")
    methods = ("hessian_diagonal", "hessian_trace", "hessian_eigenvalues")
    taken = {method: set(inspect.signature(getattr(probe, method)).parameters) for method in methods}
    if "every" in given:
        raise InvalidArgumentError("CurvatureRecorder takes log_every= in place of every=.")
    unknown = sorted(given.keys() - set.union(*taken.values()))
    if unknown:
        raise InvalidArgumentError(f"CurvatureRecorder has no option {unknown[0]!r}, and neither has a measurement.")
    return {method: {key: value for key, value in given.items() if key in taken[method]} for method in methods}
