"""Per-layer curvature of live PyTorch models: exact Fisher and Hessian diagonals, gathered by hooks."""

from .core.diagnosis import diagnose
from .core.per_layer_curvature import (
    get_layer_curvature_stats,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)
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
from .monitor.findings import Diagnosis, Finding
from .monitor.recorder import CurvatureRecorder
from .monitor.table import Report, report
from .oneshot.eigenvalues import Eigenvalues
from .oneshot.hessian.cost import LayerCost
from .oneshot.trace import Trace
from .probe import CurvatureProbe
from .results import Diagonals, LayerInfo, Strategy

__all__ = [
    "AttributionError",
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
    "NonFiniteError",
    "ProbeStateError",
    "Report",
    "RuleError",
    "SecorderError",
    "Strategy",
    "Trace",
    "diagnose",
    "get_layer_curvature_stats",
    "per_layer_fisher_diagonal",
    "per_layer_hessian_diagonal",
    "report",
]
