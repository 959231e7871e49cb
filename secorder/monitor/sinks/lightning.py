"""Any logger of Lightning: CSVLogger, MLFlowLogger, WandbLogger, one of the user's own."""

from collections.abc import Mapping
from typing import Any

from ..._arguments import require_method

__all__ = ["LightningSink"]


class LightningSink:
    """Hands numbers to a logger's ``log_metrics(metrics, step)``.

    Args:
        logger: a ``lightning.pytorch.loggers.Logger``, or anything with that method.
    """

    def __init__(self, logger: Any) -> None:
        require_method("logger", logger, "log_metrics")
        self._logger = logger

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._logger.log_metrics(dict(numbers), step)
