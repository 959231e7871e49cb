"""Summaries of diagonals."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["get_layer_curvature_stats", "layer_statistics"]

_NAMES = ("mean", "std", "max", "min", "trace", "negative")


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
    return {
        name: {key: row[key] for key in ("mean", "std", "max", "min")}
        for name, row in layer_statistics(layer_curvatures).items()
    }


def layer_statistics(layer_curvatures: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """:func:`get_layer_curvature_stats`, with the trace (sum) and the share of negative entries as well.

    Args:
        layer_curvatures: layer name → tensor of any shape and real dtype.

    Returns:
        layer name → ``{"mean", "std", "max", "min", "trace", "negative"}``, Python floats, from one transfer.
    """
    if not layer_curvatures:
        return {}
    device = next(iter(layer_curvatures.values())).device
    rows = torch.stack([_summary(d).to(device) for d in layer_curvatures.values()]).tolist()
    return {name: dict(zip(_NAMES, row, strict=True)) for name, row in zip(layer_curvatures, rows, strict=True)}


def _summary(diagonal: Tensor) -> Tensor:
    values = diagonal.detach().double().flatten()
    if values.numel() == 0:
        return values.new_full((len(_NAMES),), torch.nan)
    std = values.std() if values.numel() > 1 else values.new_zeros(())
    negative = (values < 0).double().mean()
    return torch.stack([values.mean(), std, values.amax(), values.amin(), values.sum(), negative])
