"""A run as a figure."""

from pathlib import Path

import pytest

from secorder import InvalidArgumentError, InvalidTypeError
from secorder.monitor.history import History
from secorder.monitor.plot import plot


def test_a_figure_has_all_layers_and_lines_of_the_largest(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = History()
    for step in (1, 2, 5):
        history.add(step, {"fisher_trace": {f"net.{i}": float(i + 1) * step for i in range(20)}})
    figure = plot(history, top=3)
    heat, lines = figure.axes[:2]
    assert [label.get_text() for label in heat.get_yticklabels()] == [str(i) for i in range(20)]
    assert [line.get_label() for line in lines.get_lines()] == ["19", "18", "17"]
    assert lines.get_yscale() == "log"
    figure.savefig(tmp_path / "run.png")


def test_what_was_not_logged() -> None:
    with pytest.raises(InvalidArgumentError, match=r"nothing was logged of 'loss'"):
        plot(History(), "loss")


def test_what_is_no_history() -> None:
    with pytest.raises(InvalidTypeError, match=r"such as recorder\.history"):
        plot(None)  # type: ignore[arg-type]
