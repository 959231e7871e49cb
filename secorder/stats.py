"""Summaries of diagonals."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["get_layer_curvature_stats"]


def get_layer_curvature_stats(layer_curvatures: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation, maximum and minimum of each layer's diagonal.

    Args:
        layer_curvatures: layer name → tensor of any shape and real dtype, as the diagonal functions return it.

    Returns:
        layer name → ``{"mean", "std", "max", "min"}``, Python floats. ``std`` is the sample standard deviation
        ``sqrt(Σ (d − mean)² / (n − 1))``, 0 for a single element; an empty tensor gives nan. All layers travel to
        the host in one transfer.

    Example:
        >>> import torch
        >>> from secorder import get_layer_curvature_stats
        >>> get_layer_curvature_stats({"fc": torch.tensor([1.0, 3.0])})["fc"]["mean"]
        2.0
    """
    if not layer_curvatures:
        return {}
    device = next(iter(layer_curvatures.values())).device
    rows = torch.stack([_summary(d).to(device) for d in layer_curvatures.values()]).tolist()
    return {
        name: dict(zip(("mean", "std", "max", "min"), row, strict=True))
        for name, row in zip(layer_curvatures, rows, strict=True)
    }


def _summary(diagonal: Tensor) -> Tensor:
    values = diagonal.detach().double().flatten()
    if values.numel() == 0:
        return values.new_full((4,), torch.nan)
    std = values.std() if values.numel() > 1 else values.new_zeros(())
    return torch.stack([values.mean(), std, values.amax(), values.amin()])
