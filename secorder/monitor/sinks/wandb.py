"""Weights & Biases: a run's charts, histograms and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..._arguments import require_method
from ...errors import InvalidArgumentError

__all__ = ["WandbSink"]


class WandbSink:
    """Logs to a run of Weights & Biases (``pip install wandb``).

    The x axis of all that is logged here is its own, ``curvature_step``: a run drops what comes with an older step than
    something that the training itself has logged.

    Args:
        run: what ``wandb.init()`` returned; by default the run that is active.

    Raises:
        ImportError: wandb is missing.
        InvalidArgumentError: there is no run.
    """

    STEP = "curvature_step"

    def __init__(self, run: Any = None) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = wandb.run if run is None else run
        if self._run is None:
            raise InvalidArgumentError("there is no active run of wandb: call wandb.init(), or pass run=.")
        require_method("run", self._run, "define_metric")
        self._run.define_metric(self.STEP, hidden=True)
        self._groups: set[str] = set()

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._log(step, dict(numbers))

    def histogram(self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]) -> None:
        """Log a histogram."""
        self._log(step, {name: self._wandb.Histogram(np_histogram=(list(counts), list(edges)))})

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Log a picture."""
        self._log(step, {name: self._wandb.Image(pixels)})

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text."""
        self._log(step, {name: self._wandb.Html(f"<pre>{text}</pre>")})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        for group in {name.partition("/")[0] + ("/*" if "/" in name else "") for name in values} - self._groups:
            self._groups.add(group)
            self._run.define_metric(group, step_metric=self.STEP)
        self._run.log({self.STEP: step, **values})
