"""Per-layer curvature of live PyTorch models: exact Fisher and Hessian diagonals, gathered by hooks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.per_layer_curvature import get_layer_curvature_stats, per_layer_fisher_diagonal, per_layer_hessian_diagonal
from .errors import (
    AttributionError,
    CouplingError,
    CurvatureWarning,
    DoubleBackwardError,
    InvalidArgumentError,
    InvalidTypeError,
    NonFiniteError,
    ProbeStateError,
    RuleError,
    SecorderError,
)
from .means import weighted_mean
from .oneshot.eigenvalues import Eigenvalues
from .oneshot.hessian.cost import Cost, LayerCost
from .oneshot.trace import Trace
from .online.losses.reduction import token_weights
from .online.noise import NoiseScale, NoiseScales
from .online.verification import Verification
from .online.window import Window
from .probe import CurvatureProbe
from .results import Diagonals, LayerInfo, Strategy

if TYPE_CHECKING:
    from .core.diagnosis import diagnose
    from .monitor.findings import Diagnosis, Finding
    from .monitor.recorder import CurvatureRecorder
    from .monitor.table import Report, report

__all__ = [
    "AttributionError",
    "Cost",
    "CouplingError",
    "CurvatureProbe",
    "CurvatureRecorder",
    "CurvatureWarning",
    "Diagnosis",
    "Diagonals",
    "DoubleBackwardError",
    "Eigenvalues",
    "Finding",
    "InvalidArgumentError",
    "InvalidTypeError",
    "LayerCost",
    "LayerInfo",
    "NoiseScale",
    "NoiseScales",
    "NonFiniteError",
    "ProbeStateError",
    "Report",
    "RuleError",
    "SecorderError",
    "Strategy",
    "Trace",
    "Verification",
    "Window",
    "diagnose",
    "get_layer_curvature_stats",
    "per_layer_fisher_diagonal",
    "per_layer_hessian_diagonal",
    "report",
    "token_weights",
    "weighted_mean",
]

__version__ = "0.2.0"

#: What shows results, and where it is: with it come rich and numpy, which a model that only trains does not need.
_WHEN_USED = {
    "CurvatureRecorder": ".monitor.recorder",
    "Diagnosis": ".monitor.findings",
    "Finding": ".monitor.findings",
    "Report": ".monitor.table",
    "diagnose": ".core.diagnosis",
    "report": ".monitor.table",
}


def __getattr__(name: str) -> Any:
    """Load what shows results when it is used for the first time."""
    if name not in _WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_WHEN_USED[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *__all__])
