"""How exact, and what it may cost."""

import math
import time
from typing import Any

import pytest
import torch.nn.functional as F

from secorder import CurvatureProbe, InvalidArgumentError
from secorder.oneshot.hessian import chain
from secorder.oneshot.hessian.budget import AUTO_RTOL, AUTO_SECONDS, MAX_HVPS, MAX_WORK, Budget

from ...helpers import data, mlp


def checked(
    method: Any = "auto", num_draws: Any = None, rtol: Any = None, max_draws: Any = None, max_hvps: Any = None
) -> Budget:
    return Budget.checked(method, num_draws, rtol, max_draws, max_hvps)


def test_what_is_not_said_follows_from_the_method() -> None:
    seconds = AUTO_SECONDS, AUTO_SECONDS / 2
    assert checked() == Budget("auto", 16, AUTO_RTOL, 10_000, MAX_HVPS, MAX_WORK, *seconds)
    assert checked(num_draws=5) == Budget("auto", 5, None, 10_000, MAX_HVPS, MAX_WORK, *seconds)
    assert checked(rtol=0.1) == Budget("auto", 16, 0.1, 10_000, MAX_HVPS, MAX_WORK, AUTO_SECONDS)
    assert checked(max_hvps=7) == Budget("auto", 16, AUTO_RTOL, 10_000, 7, math.inf)
    assert checked("hutchinson") == Budget("hutchinson", 100)
    assert checked("hutchinson", rtol=0.1) == Budget("hutchinson", 16, 0.1)


def test_products_that_were_timed_are_afforded_by_their_seconds() -> None:
    auto = checked()
    assert auto.affords(100, 10**9, 0.09)  # not by the numbers that they pass through
    assert not auto.affords(100, 1, 0.11)
    assert not auto.affords(MAX_HVPS + 1, 1, 1e-9)
    assert checked(max_hvps=100).affords(100, 10**9, 100.0)
    assert not auto.affords(100, 10**9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "lanczos"}, "method must be"),
        ({"num_draws": 0}, "num_draws must be"),
        ({"rtol": 0.0}, "rtol must be"),
        ({"rtol": math.nan}, "rtol must be"),
        ({"max_hvps": -1}, "max_hvps must be at least 0"),
        ({"method": "exact", "max_hvps": 3}, 'goes with method="auto"'),
        ({"rtol": 0.1, "num_draws": 20, "max_draws": 10}, "max_draws must be at least num_draws"),
        ({"method": "exact", "num_draws": 3}, "num_draws=3 goes with"),
        ({"method": "exact", "rtol": 0.1}, "rtol=0.1 goes with"),
        ({"method": "exact", "max_draws": 9}, "max_draws=9 goes with"),
        ({"method": "hutchinson", "max_hvps": 3}, "max_hvps=3 goes with"),
        ({"method": "hutchinson", "max_draws": 200}, "max_draws=200 goes with rtol"),
        ({"num_draws": 8, "max_draws": 9}, "max_draws=9 goes with rtol"),
    ],
)
def test_what_contradicts_itself_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        checked(**arguments)


def test_as_many_draws_as_are_asked_for_need_no_room() -> None:
    assert checked("hutchinson", num_draws=20_000).num_draws == 20_000
    assert checked(max_draws=50).max_draws == 50


def test_what_is_affordable() -> None:
    assert Budget("exact").affords(10**12, 10**12)
    assert not Budget("hutchinson").affords(1, 1)
    auto = Budget("auto", max_hvps=10, max_work=100)
    assert [auto.affords(*of) for of in ((10, 10), (11, 1), (10, 11))] == [True, False, False]


def test_draws_that_there_is_time_for() -> None:
    auto = Budget.checked("auto", None, None, None, None)
    fewer = auto.within(5.0, 0.5)
    assert (fewer.num_draws, fewer.max_draws) == (10, 10)
    assert auto.within(5.0, 0.01).num_draws == auto.num_draws
    assert auto.within(5.0, 0.01).max_draws == 500
    assert auto.within(5.0, 100.0).max_draws == 2  # of which there is an error
    for budget, seconds, by_draw in ((auto, 5.0, 0.0), (auto, math.inf, 1.0), (Budget("hutchinson", 50), 1.0, 1.0)):
        assert budget.within(seconds, by_draw) is budget


def test_what_was_spent_is_not_there_for_the_rest() -> None:
    auto = checked()
    assert (auto.after(4.0).max_seconds, auto.after(4.0).draw_seconds) == pytest.approx((6.0, 3.0))
    assert (auto.after(99.0).max_seconds, auto.after(99.0).draw_seconds) == pytest.approx((2.5, 1.25))
    assert checked(rtol=0.1).after(4.0).draw_seconds == math.inf
    for others in (checked("hutchinson"), checked("exact"), checked(max_hvps=7)):
        assert others.after(4.0) == others


def test_the_seconds_of_a_chain_are_spent_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spent, carried = [], chain.run

    def after(self: Budget, seconds: float) -> Budget:
        spent.append(seconds)
        return self

    def slowly(*args: Any) -> Any:
        time.sleep(0.2)
        return carried(*args)

    monkeypatch.setattr(Budget, "after", after)
    monkeypatch.setattr(chain, "run", slowly)
    monkeypatch.setattr("secorder.oneshot.hessian.cost.seconds_of_chain", lambda *_: {"0": 1.0, "2": 1.5, "4": 0.5})
    with CurvatureProbe(mlp()) as probe:
        assert {i.strategy for i in probe.hessian_diagonal(F.cross_entropy, *data()).info.values()} == {"chain"}
        probe.estimate_cost(F.cross_entropy, *data())
    assert spent[0] >= 0.2
    assert spent[1:] == [pytest.approx(3.0)]
