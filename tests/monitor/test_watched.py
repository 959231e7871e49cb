"""What is needed of a probe."""

import pytest

from secorder import CurvatureProbe, InvalidArgumentError
from secorder.monitor.watched import measurement_options

from ..helpers import make


def test_each_measurement_gets_what_it_takes() -> None:
    probe = CurvatureProbe(make())
    found = measurement_options(probe, {"method": "exact", "max_iterations": 7, "chunk_size": 2})
    assert found == {
        "hessian_diagonal": {"method": "exact", "chunk_size": 2},
        "hessian_trace": {"method": "exact", "chunk_size": 2},
        "hessian_eigenvalues": {"max_iterations": 7, "chunk_size": 2},
    }
    with pytest.raises(InvalidArgumentError, match="no option 'iterations'"):
        measurement_options(probe, {"iterations": 3})
