"""A schedule: log the online Fisher often, and the Hessian now and then on a held batch."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from .._keywords import refuse_renamed
from ..errors import InvalidArgumentError
from .tensorboard import Writer

__all__ = ["CurvatureRecorder"]


class Probe(Protocol):
    """What is needed of a :class:`secorder.CurvatureProbe`."""

    @property
    def num_samples(self) -> int:
        """How many samples the accumulated Fisher has seen."""

    @property
    def hessian_diagonal(self) -> Callable[..., Any]:
        """The method that measures the Hessian diagonal per layer."""

    def log(self, writer: Any, step: int, *, hessian: Mapping[str, Tensor] | None = None) -> None:
        """Write the accumulated Fisher, and a Hessian diagonal."""


class CurvatureRecorder:
    """Logs a probe's curvature while a model trains; call :meth:`step` once a training step.

    Args:
        probe: the probe, attached to the model that trains.
        writer: anything with the methods of ``torch.utils.tensorboard.SummaryWriter``.
        every: log the Fisher at each ``every``-th step.
        hessian_every: measure and log the Hessian at each ``hessian_every``-th step; never by default.
        loss_fn: the loss of the Hessian.
        batch: ``(inputs, targets)`` that the Hessian is measured on, held fixed so that steps compare.
        hessian_options: further arguments of :meth:`secorder.CurvatureProbe.hessian_diagonal`, such as ``method``.

    Raises:
        InvalidArgumentError: an interval is below 1, ``hessian_every`` comes without a loss or a batch, or an option
            had another name.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from secorder import CurvatureProbe, CurvatureRecorder
        >>> model, loss_fn = torch.nn.Linear(4, 2), torch.nn.MSELoss()
        >>> batch = torch.randn(8, 4), torch.randn(8, 2)
        >>> probe = CurvatureProbe(model)
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     recorder = CurvatureRecorder(probe, writer, every=2, hessian_every=4, loss_fn=loss_fn, batch=batch)
        ...     for _ in range(4):
        ...         loss_fn(model(batch[0]), batch[1]).backward()
        ...         recorder.step()
    """

    def __init__(
        self,
        probe: Probe,
        writer: Writer,
        *,
        every: int = 10,
        hessian_every: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        batch: tuple[Any, Any] | None = None,
        **hessian_options: Any,
    ) -> None:
        if every < 1 or (hessian_every is not None and hessian_every < 1):
            raise InvalidArgumentError(f"intervals must be at least 1, got {every} and {hessian_every}.")
        refuse_renamed(hessian_options, "hessian_diagonal()")
        if hessian_every is not None and (loss_fn is None or batch is None):
            raise InvalidArgumentError("hessian_every needs loss_fn= and batch=(inputs, targets) to measure on.")
        self._probe = probe
        self._writer = writer
        self._every = every
        self._hessian_every = hessian_every
        self._loss_fn = loss_fn
        self._batch = batch
        self._hessian_options = hessian_options
        self._steps = 0

    def step(self, step: int | None = None) -> None:
        """Count a training step and log what is due.

        Args:
            step: the number of the step in the log; by default how often this was called.

        Raises:
            SecorderError: as the probe's :meth:`~secorder.CurvatureProbe.log` and
                :meth:`~secorder.CurvatureProbe.hessian_diagonal`.
        """
        self._steps += 1
        step = self._steps if step is None else step
        hessian = None
        if self._hessian_every is not None and self._steps % self._hessian_every == 0:
            assert self._loss_fn is not None
            assert self._batch is not None
            hessian = self._probe.hessian_diagonal(self._loss_fn, *self._batch, **self._hessian_options)
        if (self._steps % self._every == 0 or hessian is not None) and self._probe.num_samples:
            self._probe.log(self._writer, step, hessian=hessian)
