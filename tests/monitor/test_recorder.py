"""The recorder."""

from typing import Any

import pytest

from secorder import CurvatureProbe, CurvatureRecorder, InvalidArgumentError

from ..helpers import Recording, make


@pytest.mark.parametrize("arguments", [{"every": 0}, {"hessian_every": 0}, {"hessian_every": 5}])
def test_recorder_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        CurvatureRecorder(CurvatureProbe(make()), Recording(), **arguments)
