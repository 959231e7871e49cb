"""What is needed of a probe."""

import pytest

from secorder import CurvatureProbe, InvalidArgumentError, InvalidTypeError
from secorder.monitor.watched import measurement_options

from ..helpers import make


def test_each_measurement_gets_what_it_takes() -> None:
    probe = CurvatureProbe(make())
    found = measurement_options(probe, {"method": "exact", "max_iterations": 7, "chunk_size": 2}, [])
    assert found == {
        "hessian_diagonal": {"method": "exact", "chunk_size": 2},
        "hessian_trace": {"method": "exact", "chunk_size": 2},
        "hessian_eigenvalues": {"max_iterations": 7, "chunk_size": 2},
    }
    with pytest.raises(InvalidArgumentError, match="num_draws=3 goes with method"):
        measurement_options(probe, {"method": "exact", "num_draws": 3}, [])
    with pytest.raises(InvalidArgumentError, match="no option 'max_iteration': did you mean 'max_iterations'"):
        measurement_options(probe, {"max_iteration": 3}, ["log_every"])
    with pytest.raises(InvalidArgumentError, match="no option 'log_evry': did you mean 'log_every'"):
        measurement_options(probe, {"log_evry": 3}, ["log_every"])
    with pytest.raises(InvalidTypeError, match="probe must be a CurvatureProbe, got type"):
        measurement_options(CurvatureProbe, {}, [])  # type: ignore[arg-type]
