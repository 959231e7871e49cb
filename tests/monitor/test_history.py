"""What was logged, as a table."""

import math
from itertools import pairwise

import pytest

from secorder.monitor.history import History


def test_a_table_of_what_is_logged_on_different_schedules() -> None:
    history = History()
    history.add(1, {"fisher_trace": {"a": 1.0, "b": 2.0}})
    history.add(2, {"fisher_trace": {"a": 3.0, "b": 4.0}, "hessian_trace": {"a": 5.0}})
    history.add(2, {"model": {"loss": 6.0}})
    table = history.to_dict()
    assert list(table) == ["step", "fisher_trace/a", "fisher_trace/b", "hessian_trace/a", "model/loss"]
    assert table["fisher_trace/b"] == [2.0, 4.0]
    assert math.isnan(table["hessian_trace/a"][0])
    pandas = pytest.importorskip("pandas")
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[2, "hessian_trace/a"] == 5.0


def test_memory_is_bounded_and_the_run_is_covered() -> None:
    history = History()
    history.at_most = 8
    for step in range(1000):
        history.add(step, {"often": {"a": 1.0}, **({"rare": {"a": 2.0}} if step % 300 == 0 else {})})
    steps = [step for step, _ in history.points("often")]
    assert len(steps) <= 8
    assert len({b - a for a, b in pairwise(steps)}) == 1
    assert steps[-1] > 700
    assert [step for step, _ in history.points("rare")] == [0, 300, 600, 900]
    assert history.seen("often") == 1000


def test_steps_that_come_again_are_told_once() -> None:
    history = History()
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 4.0), (3, 5.0)):  # begun again from a checkpoint
        history.add(step, {"a": {"x": value}})
    assert history.points("a") == [(1, {"x": 1.0}), (2, {"x": 4.0}), (3, {"x": 5.0})]
    assert history.to_dict() == {"step": [1, 2, 3], "a/x": [1.0, 4.0, 5.0]}


def test_state_goes_on() -> None:
    history, other = History(), History()
    history.add(1, {"a": {"x": 1.0}})
    other.load_state_dict(history.state_dict())
    other.add(2, {"a": {"x": 2.0}})
    assert other.to_dict() == {"step": [1, 2], "a/x": [1.0, 2.0]}
    assert history.to_dict() == {"step": [1], "a/x": [1.0]}


def test_a_history_says_what_it_holds() -> None:
    history = History()
    assert repr(history) == "History(0 points of nothing)"
    for step in range(3):
        history.add(step, {"fisher_trace": {"a": 1.0}, "model": {"loss": 2.0}} if step else {"model": {"loss": 2.0}})
    assert repr(history) == "History(3 points of model, fisher_trace)"
