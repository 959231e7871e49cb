"""Per-layer curvature of live PyTorch models: exact Fisher and Hessian diagonals, gathered by hooks."""

from .accumulation import CurvatureWarning
from .core.per_layer_curvature import (
    get_layer_curvature_stats,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)
from .diagnosis import Diagnosis, Finding, diagnose
from .diagonals import Diagonals, LayerInfo
from .errors import (
    AttributionError,
    CouplingError,
    DoubleBackwardError,
    InvalidArgumentError,
    InvalidTypeError,
    NonFiniteError,
    ProbeStateError,
    RuleError,
    SecorderError,
)
from .hessian import LayerCost
from .probe import CurvatureProbe
from .recorder import CurvatureRecorder
from .report import Report, report
from .spectrum import Eigenvalues, Trace

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
    "Trace",
    "diagnose",
    "get_layer_curvature_stats",
    "per_layer_fisher_diagonal",
    "per_layer_hessian_diagonal",
    "report",
]
