"""The recorder."""

from typing import Any

import pytest
from torch import nn

from secorder import CurvatureProbe, CurvatureRecorder, InvalidArgumentError


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Recording:
    """Any object with the methods of SummaryWriter will do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, (args, kwargs)))


@pytest.mark.parametrize("arguments", [{"every": 0}, {"hessian_every": 0}, {"hessian_every": 5}])
def test_recorder_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        CurvatureRecorder(CurvatureProbe(make()), Recording(), **arguments)
