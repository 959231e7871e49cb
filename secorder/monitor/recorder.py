"""A schedule: what is logged of a model that trains, and how often."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from .._caution import caution
from .._torch.collectives import has_ranks
from ..errors import AttributionError, InvalidArgumentError, SecorderError
from ..results import Diagonals
from .findings import Finding, without_tables
from .history import History
from .log import CurvatureLog, numbers_of
from .names import WHOLE_MODEL, shown
from .norms import Norms
from .running_findings import Change, Observation, RunningFindings
from .statistics import layer_statistics, whole_trace
from .training import as_floats, learning_rates, mean_loss, number_of, step_of
from .watched import Watched, check_flags, check_intervals, check_listeners, check_measured, measurement_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Why there is nothing to log.
UNSEEN = (
    "no batch went through the probe's model in {} steps, so that there is no Fisher to log: attach the probe to the "
    "module that training calls, in train mode (detach() and paused() stop it too)."
)
TAKEN = (
    "the batches that the probe records are taken out elsewhere, by another recorder or probe.window(), so that there "
    "is no Fisher to log here: give each recorder a probe of its own, or one recorder several sinks."
)


class CurvatureRecorder:
    """Logs curvature, norms and findings of a model during training; call :meth:`step` once after each training step.

    Each point shows its time: the Fisher is the mean over the samples since the last point, the loss the mean over its
    steps. Of a probe with ``decay`` it is the moving average. Names are ``statistic/layer``:

    - at each ``log_every``-th step ``fisher_trace``, ``fisher_mean``, ``fisher_max`` (the trace alone of a probe that
      accumulates traces), ``gradient_noise_scale`` (in samples; where a batch determines it), and of the whole model
      ``model/loss``, ``model/learning_rate``, ``model/fisher_trace``, ``model/gradient_noise_scale``;
    - ``norms_every``: ``gradient_norm`` and ``weight_norm`` of the layers' parameters, and ``update_to_weight``, the
      norm of the last update relative to theirs, for which the weights are copied from one step to the next;
    - ``histograms_every``: ``fisher_histogram_log10``, of ``log10`` of the entries (none where traces are accumulated);
    - ``hessian_every``: ``hessian_trace``, ``hessian_mean``, ``hessian_max``, ``hessian_negative`` (a share);
    - ``traces_every``: ``hessian_trace`` alone, for less, and where it is estimated ``hessian_trace_standard_error``;
    - ``eigenvalues_every``: ``hessian_top_eigenvalue`` of each layer's block, and ``learning_rate_times_eigenvalue``,
      which gradient descent without momentum keeps below 2.

    Those that are measured on ``batch`` log the seconds they took, too (``model/seconds_hessian``).

    Training goes on whatever happens here: what fails, in a measurement or in a sink, is warned of once.

    Args:
        probe: the probe, attached to the model that trains.
        sinks: where numbers go: a ``SummaryWriter``, a path (``"run.jsonl"``, ``"run.csv"``, else a folder for
            TensorBoard), a logger, anything with ``scalars(step, {name: number})``, or several as a list (see
            :func:`secorder.monitor.sinks.sink.sink_of`). None keeps them in :attr:`history` alone.
        log_every: see above; each interval is a number of steps, None for never.
        norms_every, histograms_every, hessian_every, traces_every, eigenvalues_every: see above.
        loss_fn: the loss of the Hessian.
        batch: ``(inputs, targets)`` that the Hessian is measured on, held fixed so that steps compare.
        optimizer: of the training, to log its learning rates and their products with eigenvalues.
        on_finding: called with a :class:`~secorder.monitor.running_findings.Change` when something that stands out
            begins or ends (a dead layer, a trace that grew tenfold); by default a warning says so. Sinks that take
            texts get all findings of now in either case.
        keep_total: as for :meth:`secorder.CurvatureProbe.window`.
        synchronize: the numbers are those of all ranks of the default process group, as is the loss, and the first rank
            alone writes to the sinks; every rank needs a recorder, and calls :meth:`step`. Where parameters lie over
            ranks (``fully_shard``) it is so in any case.
        strict: raise what fails, in place of a warning.
        hessian_options: further arguments of :meth:`secorder.CurvatureProbe.hessian_diagonal`, ``hessian_trace`` and
            ``hessian_eigenvalues``, such as ``method`` or ``max_iterations``.

    Raises:
        InvalidArgumentError: an interval is below 1, a measurement comes without a loss or a batch, or an option is
            unknown or had another name.
        InvalidTypeError: one of the sinks is none, the loss is no function, or another argument has a wrong type.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from secorder import CurvatureProbe, CurvatureRecorder
        >>> model, loss_fn = torch.nn.Linear(4, 2), torch.nn.MSELoss()
        >>> batch = torch.randn(8, 4), torch.randn(8, 2)
        >>> probe = CurvatureProbe(model, reduction="mean")
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     recorder = CurvatureRecorder(probe, writer, log_every=2, hessian_every=4, loss_fn=loss_fn, batch=batch)
        ...     for _ in range(4):
        ...         loss = loss_fn(model(batch[0]), batch[1])
        ...         loss.backward()
        ...         recorder.step(loss=loss)
        >>> recorder.history.to_dict()["step"]
        [2, 4]
    """

    def __init__(
        self,
        probe: Watched,
        sinks: Any = None,
        *,
        log_every: int | None = 10,
        norms_every: int | None = 50,
        histograms_every: int | None = 100,
        hessian_every: int | None = None,
        traces_every: int | None = None,
        eigenvalues_every: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        batch: tuple[Any, Any] | None = None,
        optimizer: Any = None,
        on_finding: Callable[[Change], None] | None = None,
        keep_total: bool = True,
        synchronize: bool = False,
        strict: bool = False,
        **hessian_options: Any,
    ) -> None:
        self._every = {
            "fisher": log_every,
            "norms": norms_every,
            "histograms": histograms_every,
            "hessian": hessian_every,
            "traces": traces_every,
            "eigenvalues": eigenvalues_every,
        }
        check_intervals(self._every)
        check_measured(self._every, loss_fn, batch)
        check_listeners(optimizer, on_finding)
        check_flags(keep_total=keep_total, synchronize=synchronize, strict=strict)
        self._probe = probe
        self._measured_on = (loss_fn, *(batch or ()))
        self._options = measurement_options(probe, hessian_options, signature(CurvatureRecorder).parameters)
        self._optimizer = optimizer
        self._strict = strict
        self._failed: set[str] = set()
        apart = any(hasattr(p, "device_mesh") for group in probe.layer_parameters.values() for p in group)
        self._together = (synchronize or apart) and has_ranks()
        self._window = {"keep_total": keep_total, "synchronize": synchronize and not apart}
        self._log = CurvatureLog([] if sinks is None or (self._together and dist.get_rank()) else sinks, strict=strict)
        self._norms = Norms(lambda: probe.layer_parameters)
        self._findings = RunningFindings(on_finding)
        self._steps = 0
        self._steps_of_window = 0
        self._unseen = 0  # steps since something was recorded
        self._samples = probe.num_samples  # that the probe told of at the last point
        self._loss: tuple[Any, int] = (0.0, 0)

    def __repr__(self) -> str:
        every = ", ".join(f"{part} every {interval}" for part, interval in self._every.items() if interval)
        return f"CurvatureRecorder({self._steps} steps; {every})"

    # ---- steps

    def see_gradients(self) -> None:
        """Measure the norms of gradients now; to be called where they are set to None before :meth:`step`."""
        if self._due("norms", self._steps + 1):
            self._attempt("norms", self._norms.see_gradients)

    def step(self, step: int | None = None, *, loss: Tensor | float | None = None) -> None:
        """Count a training step and log what is due; call it after the optimizer's step.

        Args:
            step: the number of the step in the log; by default how often this was called.
            loss: of the step, to be logged beside; it is not read until it is logged.

        Raises:
            SecorderError: with ``strict``, as the probe's measurements.
        """
        self._steps += 1
        self._steps_of_window += 1
        if loss is not None:
            self._attempt("loss", self._see_loss, loss)
        told = self._attempt("step", step_of, step)
        number = self._steps if told is None else told
        due = [part for part in self._every if part != "histograms" and self._due(part, self._steps)]
        if due:
            self._attempt("point", self._point, number, due)
        if self._due("norms", self._steps + 1):
            self._attempt("norms", self._norms.copy_weights)

    def _see_loss(self, loss: Tensor | float) -> None:
        total, count = self._loss
        self._loss = (total + number_of("loss", loss), count + 1)

    def log(self, numbers: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of yours beside: of the whole model, as ``model/name``.

        Args:
            numbers: by name.
            step: the number of the step in the log; by default how often :meth:`step` was called.

        Raises:
            InvalidTypeError: one is no number, or the step no integer.
        """
        told = step_of(step)
        self._log.numbers({WHOLE_MODEL: as_floats(numbers)}, self._steps if told is None else told)

    def _due(self, part: str, steps: int) -> bool:
        every = self._every[part]
        return every is not None and steps % every == 0

    def _point(self, step: int, due: Sequence[str]) -> None:
        """Measure what is due, give it to the sinks, and say what stands out in it."""
        point = Observation()
        diagonals: dict[str, Any] = {}
        measures: dict[str, Callable[[Observation], Any]] = {
            "fisher": self._see_fisher,
            "norms": lambda point: point.add(self._norms.numbers()),
            "hessian": self._see_hessian,
            "traces": self._see_traces,
            "eigenvalues": self._see_eigenvalues,
        }
        for part in due:
            if part == "traces" and "hessian" in due:
                continue  # which tells them too
            found = self._attempt(part, measures[part], point)
            if found is not None:
                diagonals[part] = found
        self._log.numbers(point.numbers, step)
        for kind, found in diagonals.items():
            if kind == "hessian" or self._due("histograms", self._steps):
                self._log.histograms(kind, found, step)
        changes = self._findings.update(point, step)
        if changes:
            self._log.text("findings", self._findings.markdown(step), step)

    def _attempt(self, part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of ``work``; None where it failed, which is warned of once for each part."""
        try:
            return work(*arguments)
        except Exception as error:
            if self._strict:
                raise
            reason = str(error) if isinstance(error, SecorderError) else f"{type(error).__name__}: {error}"
            if f"{part}: {type(error)}" not in self._failed:
                self._failed.add(f"{part}: {type(error)}")
                caution(f"the recorder could not log its {part}, and training goes on: {reason}")
            return None

    # ---- what is measured

    def _see_fisher(self, point: Observation) -> Diagonals | None:
        """The window's Fisher, its loss and learning rate; returns the diagonal, if there is one."""
        total, count = self._loss
        self._loss = (0.0, 0)
        if count:
            point.add({WHOLE_MODEL: {"loss": mean_loss(total, count, together=self._together)}})
        if self._optimizer is not None:
            point.add({WHOLE_MODEL: {"learning_rate": max(float(g["lr"]) for g in self._optimizer.param_groups)}})
        source = self._samples_seen(point)
        if not source.num_samples:
            return None
        fisher: Diagonals | None = None
        if self._probe.accumulate == "trace":
            traces = {shown(name): trace.value for name, trace in source.fisher_trace(missing="skip").items()}
            point.fisher = {  # of entries only this is known: all are zero, or one is not finite
                name: {"zero": float(value == 0), "nonfinite": float(not math.isfinite(value))}
                for name, value in traces.items()
            }
            numbers = {"fisher_trace": traces}
        else:
            fisher = source.fisher_diagonal(missing="skip")
            statistics = layer_statistics(fisher)
            point.fisher = {shown(name): row for name, row in without_tables(statistics, fisher).items()}
            numbers = numbers_of("fisher", statistics)
        point.add({**numbers, WHOLE_MODEL: {"fisher_trace": whole_trace(self._probe, numbers["fisher_trace"])}})
        self._see_noise(source, point)
        return fisher

    def _samples_seen(self, point: Observation) -> Any:
        """What the probe recorded since the last point, or its moving average; warns where that is nothing."""
        steps, self._steps_of_window = self._steps_of_window, 0
        source: Any = self._probe
        if self._probe.decay is None:
            source = self._probe.window(**self._window)
            point.left_out = [shown(name) for name in source.num_skipped]  # a moving average goes on without it
            point.batch_size = source.num_samples * self._probe.every / steps
        elif self._window["synchronize"]:
            self._probe.synchronize()
        self._unseen = 0 if source.num_batches or source.num_samples else self._unseen + steps
        before, self._samples = self._samples, self._probe.num_samples
        if not source.num_samples and self._unseen >= self._probe.every and "unseen" not in self._failed:
            self._failed.add("unseen")
            caution(TAKEN if self._samples > before else UNSEEN.format(self._unseen))
        return source

    def _see_noise(self, source: Any, point: Observation) -> None:
        """The gradient noise scale, where a batch of the window tells it: not every one does."""
        try:
            noise = source.gradient_noise_scale(missing="skip")
        except AttributionError:
            return
        whole = noise.total
        scales = {shown(name): scale.value for name, scale in noise.items()}
        point.add({"gradient_noise_scale": scales, WHOLE_MODEL: {"gradient_noise_scale": whole.value}})
        point.noise = whole.squared_norm, whole.variance

    def _measure(self, method: str, point: Observation, name: str, **usual: Any) -> Any:
        start = time.perf_counter()
        found = getattr(self._probe, method)(*self._measured_on, **usual | self._options[method])
        point.add({WHOLE_MODEL: {f"seconds_{name}": time.perf_counter() - start}})
        return found

    def _see_hessian(self, point: Observation) -> Diagonals:
        hessian: Diagonals = self._measure("hessian_diagonal", point, "hessian")
        statistics = layer_statistics(hessian)
        point.hessian = {shown(name): row for name, row in statistics.items()}
        numbers = numbers_of("hessian", statistics)
        point.add({**numbers, WHOLE_MODEL: {"hessian_trace": whole_trace(self._probe, numbers["hessian_trace"])}})
        return hessian

    def _see_traces(self, point: Observation) -> None:
        traces = self._measure("hessian_trace", point, "traces")
        errors = {shown(name): t.standard_error for name, t in traces.items() if t.num_draws}
        values = {shown(name): t.value for name, t in traces.items()}
        point.add({"hessian_trace": values, "hessian_trace_standard_error": errors})
        point.add({WHOLE_MODEL: {"hessian_trace": whole_trace(self._probe, values)}})

    def _see_eigenvalues(self, point: Observation) -> None:
        found = self._measure("hessian_eigenvalues", point, "eigenvalues", which="top")
        top = {name: e.top[0] for name, e in found.items() if e.top}
        rates = learning_rates(self._optimizer, self._probe.layer_parameters)
        products = {shown(name): rates[name] * value for name, value in top.items() if name in rates}
        point.add({"hessian_top_eigenvalue": {shown(name): value for name, value in top.items()}})
        point.add({"learning_rate_times_eigenvalue": products})
        if products:
            point.add({WHOLE_MODEL: {"learning_rate_times_eigenvalue": max(products.values())}})

    # ---- what was logged

    @property
    def history(self) -> History:
        """What was logged, of which ``to_dict()`` and ``to_pandas()`` make a table."""
        return self._log.history

    @property
    def findings(self) -> list[Finding]:
        """What stands out now."""
        return self._findings.now

    def plot(self, statistic: str = "fisher_trace", *, top: int = 10) -> "Figure":
        """A picture of a statistic over the run: heat map of all layers, and lines of the largest ones.

        Args:
            statistic: what to show: one of ``history.statistics``.
            top: how many layers have lines.

        Returns:
            a matplotlib figure; in a notebook it is shown.

        Raises:
            ImportError: matplotlib is missing.
            InvalidArgumentError: nothing was logged of it.
        """
        from .plot import plot

        return plot(self.history, statistic, top=top)

    def close(self) -> None:
        """Close what the recorder opened: the writers of paths."""
        self._log.close()

    def __enter__(self) -> "CurvatureRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule, the history and the findings are, as plain Python: to go on in another process."""
        total, count = self._loss
        return {
            "steps": self._steps,
            "steps_of_window": self._steps_of_window,
            "loss": (float(total), count),
            "history": self.history.state_dict(),
            "findings": self._findings.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            InvalidArgumentError: it is something else; nothing is changed.
        """
        if not isinstance(state, Mapping) or not self.state_dict().keys() <= state.keys():
            raise InvalidArgumentError("the state is not one of CurvatureRecorder.state_dict().")
        self._steps, self._steps_of_window = state["steps"], state["steps_of_window"]
        self._loss = (state["loss"][0], state["loss"][1])
        self.history.load_state_dict(state["history"])
        self._findings.load_state_dict(state["findings"])
