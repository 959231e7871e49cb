"""The sink for what somebody has."""

from pathlib import Path
from typing import Any

import pytest

from secorder import InvalidArgumentError, InvalidTypeError
from secorder.monitor.sinks.csv import CSVSink
from secorder.monitor.sinks.json_lines import JSONLinesSink
from secorder.monitor.sinks.lightning import LightningSink
from secorder.monitor.sinks.sink import sink_of, sinks_of
from secorder.monitor.sinks.tensorboard import TensorBoardSink

from ...helpers import Taking


class Logger:
    """As Lightning's."""

    def __init__(self, experiment: Any = None) -> None:
        self.experiment = experiment

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log."""


class Writer:
    """Has one method."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write."""


def test_each_kind_finds_its_sink(tmp_path: Path) -> None:
    own = Taking()
    assert sink_of(own) is own
    kinds: dict[type, list[Any]] = {
        CSVSink: [tmp_path / "new" / "run.csv"],
        JSONLinesSink: [str(tmp_path / "run.jsonl")],
        TensorBoardSink: [tmp_path / "runs", Writer(), Logger(Writer())],
        LightningSink: [Logger()],
    }
    for kind, given in kinds.items():
        assert all(isinstance(sink, kind) for sink in sinks_of(given))
    assert sinks_of([]) == []
    assert sinks_of(own) == [own]


@pytest.mark.parametrize("given", [None, 3, object(), {"a": 1}])
def test_what_is_no_sink(given: Any) -> None:
    with pytest.raises(InvalidTypeError, match="a sink has scalars"):
        sink_of(given)


def test_a_class_or_an_empty_path_is_no_sink() -> None:
    with pytest.raises(InvalidTypeError, match=r"the class Writer, not made yet: pass Writer\("):
        sink_of(Writer)
    with pytest.raises(InvalidArgumentError, match="must not be empty"):
        sink_of("")


@pytest.mark.parametrize("name", ["run.txt", "runs/run.json"])
def test_a_file_of_another_kind_is_no_folder(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"run.*: pass one that ends in \.jsonl or \.csv"):
        sink_of(name)


def test_a_folder_that_is_there_may_have_any_name(tmp_path: Path) -> None:
    for name in ("runs.log", "exp.2024"):
        (tmp_path / name).mkdir()
        assert isinstance(sink_of(tmp_path / name), TensorBoardSink)


@pytest.mark.parametrize("kind", [CSVSink, JSONLinesSink, TensorBoardSink, LightningSink])
def test_a_sink_is_made_of_what_it_writes_to(kind: Any) -> None:
    with pytest.raises(InvalidTypeError, match="must "):
        kind(None)
