"""Diagonals as numbers, histograms and pictures."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from secorder import InvalidTypeError
from secorder.monitor.log import PICTURES, CurvatureLog, log_diagonals
from secorder.monitor.sinks.tensorboard import TensorBoardSink

from ..helpers import Taking


class Everything(Taking):
    """A sink that takes all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.histograms: dict[str, tuple[list[float], list[float]]] = {}
        self.images: list[str] = []

    def histogram(self, step: int, name: str, edges: list[float], counts: list[float]) -> None:
        self.histograms[name] = (edges, counts)

    def image(self, step: int, name: str, pixels: Any) -> None:
        self.images.append(name)


def test_values_that_are_not_finite_are_logged_and_crash_nothing() -> None:
    sink = Everything()
    diagonals = {
        "nan": torch.tensor([1.0, torch.nan]),
        "inf": torch.tensor([1.0, torch.inf, 2.0]),
        "zero": torch.zeros(3),
        "none": torch.zeros(0),
    }
    log = CurvatureLog(sink)
    for step in range(3):
        log.diagonals("hessian", diagonals, step)
    scalars = sink.points[-1][1]
    assert math.isnan(scalars["hessian_mean/nan"])
    assert math.isinf(scalars["hessian_max/inf"])
    assert scalars["hessian_nonfinite/nan"] == 0.5
    assert scalars["hessian_nonfinite/inf"] == pytest.approx(1 / 3)
    assert "hessian_nonfinite/zero" not in scalars
    assert set(sink.histograms) == {"hessian_histogram_log10/nan", "hessian_histogram_log10/inf"}
    edges, counts = sink.histograms["hessian_histogram_log10/inf"]
    assert sum(counts) == 2
    assert (edges[0], edges[-1]) == (pytest.approx(0.0), pytest.approx(math.log10(2)))


def test_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    for name in ("tolist", "item", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, original: Any = original) -> Any:
            transfers.append(self.shape)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    log_diagonals(Everything(), {str(i): torch.rand(7) for i in range(20)}, 0, "fisher")
    assert len(transfers) == 1


def test_pictures_are_drawn_ever_less_often() -> None:
    sink = Everything()
    log = CurvatureLog(sink)
    for step in range(200):
        log.numbers({"fisher_trace": {"a": 1.0}}, step)
    assert set(sink.images) == {f"{PICTURES}/fisher_trace"}
    assert 5 < len(sink.images) < 30


@pytest.mark.parametrize("step", [None, "1", 1.5])
def test_a_step_is_an_integer(step: Any) -> None:
    with pytest.raises(InvalidTypeError, match="step must be an integer"):
        log_diagonals(Taking(), {"a": torch.rand(3)}, step, "fisher")


@pytest.mark.parametrize("diagonals", [{"a": torch.rand(3)}, {"a": 3}])
def test_what_a_path_opens_is_closed(diagonals: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    closed: list[Any] = []
    monkeypatch.setattr(TensorBoardSink, "close", lambda sink: closed.append(sink))
    with nullcontext() if isinstance(diagonals["a"], torch.Tensor) else pytest.raises(InvalidTypeError):
        log_diagonals(tmp_path, diagonals, 0, "fisher")
    assert len(closed) == 1
