"""Curvature in TensorBoard: scalars per layer that group and sort in its pages."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from .stats import layer_statistics

__all__ = ["log_diagonals"]


class ScalarWriter(Protocol):
    """What is needed of a ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """Write one number."""


def log_diagonals(writer: ScalarWriter, diagonals: Mapping[str, Tensor], step: int, kind: str) -> None:
    """Write every layer's mean, std, max, min and trace, and for a Hessian the share of negative entries.

    Tags are ``kind/statistic/layer`` (``fisher/mean/conv1``), so that a statistic's charts of all layers are in one
    group. Everything travels to the host in one transfer.

    Args:
        writer: anything with ``add_scalar``, such as ``torch.utils.tensorboard.SummaryWriter``.
        diagonals: layer name → diagonal.
        step: the training step.
        kind: first part of the tag: ``"fisher"``, ``"hessian"``; ``"hessian"`` adds the negative share.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> writer = SummaryWriter("runs/digits")  # doctest: +SKIP
        >>> log_diagonals(writer, probe.fisher_diagonal(), step, "fisher")  # doctest: +SKIP
    """
    for name, statistics in layer_statistics(diagonals).items():
        for key, value in statistics.items():
            if key != "negative" or kind == "hessian":
                writer.add_scalar(f"{kind}/{key}/{name or 'model'}", value, step)
