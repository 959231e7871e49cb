"""The same objects as in :mod:`secorder.core.per_layer_curvature`."""

from secorder.core.per_layer_curvature import (
    get_layer_curvature_stats,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)

__all__ = ["get_layer_curvature_stats", "per_layer_fisher_diagonal", "per_layer_hessian_diagonal"]
