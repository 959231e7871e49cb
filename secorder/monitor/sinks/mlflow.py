"""MLflow: metrics of a run, in one request a point."""

import re
import time
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidArgumentError

__all__ = ["MLflowSink"]

#: What MLflow refuses in names, of metrics and of pictures.
_REFUSED = re.compile(r"[^/\w.\- ]")

#: What MLflow takes in one request.
_METRICS_OF_A_REQUEST = 1000


class MLflowSink:
    """Logs metrics to a run of MLflow (``pip install mlflow``, or ``mlflow-skinny``).

    Args:
        run_id: of the run; by default the one that is active now.
        client: an ``mlflow.MlflowClient``; by default one of the tracking URI that is set.

    Raises:
        ImportError: MLflow is missing.
        InvalidArgumentError: there is no run.
    """

    def __init__(self, run_id: str | None = None, *, client: Any = None) -> None:
        import mlflow
        from mlflow.entities import Metric

        active = mlflow.active_run()
        if run_id is None and active is None:
            raise InvalidArgumentError("there is no active run of MLflow: call mlflow.start_run(), or pass run_id=.")
        self._run_id = run_id or active.info.run_id
        self._client = client or mlflow.MlflowClient()
        self._metric = Metric

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(_REFUSED.sub("_", name), value, now, step) for name, value in numbers.items()]
        for start in range(0, len(metrics), _METRICS_OF_A_REQUEST):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _METRICS_OF_A_REQUEST])

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Log a picture."""
        try:
            self._client.log_image(self._run_id, pixels, key=_REFUSED.sub("_", name), step=step)
        except ImportError:  # the skinny package has no pillow of its own
            return

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text as a file of the run."""
        self._client.log_text(self._run_id, text, f"{name}/{step}.md")
