"""How long products take, by a clock of our own."""

import pytest
import torch

from secorder.oneshot.timing import (
    Rehearsal,
    bytes_of_products,
    least_seconds_of,
    of_nearest,
    seconds_of,
    seconds_per_product,
)


@pytest.mark.parametrize(
    ("product", "allowance", "most", "batches"),
    [
        (0.002, 0.01, 50, [2, 1, 5]),
        (0.002, 0.0, 50, [2, 1]),
        (0.002, 1e9, 7, [2, 1, 7]),
        (2.0, 0.5, 50, [2]),
        (2.0, 0.5, 1, [1]),
    ],
)
def test_two_trials_tell_what_one_product_takes(
    monkeypatch: pytest.MonkeyPatch, product: float, allowance: float, most: int, batches: list[int]
) -> None:
    """What happens the first time alone takes a few milliseconds, which are left out of short ones."""
    now, made = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def trial(count: int) -> None:
        made.append(count)
        now[0] += product * count + (0.007 if len(made) == 1 else 0)

    assert seconds_per_product(trial, most, allowance) == pytest.approx(product, rel=0.01)
    assert made == batches


def test_several_products_at_once_may_take_longer_each_than_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def trial(count: int) -> None:
        now[0] += count * (0.02 if count == 1 else 0.035)

    for allowance in (0.01, 1.0):
        assert seconds_per_product(trial, 16, allowance) == pytest.approx(0.035)
    assert seconds_per_product(trial, 1, 0.01) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("allowance", "most", "num_bytes"),
    [(10.0, 50, 800 + 50 * 4000), (10.0, 3, 800 + 3 * 4000), (0.0, 50, 0), (0.0, 1, 4800)],
)
def test_memory_of_many_products_is_told_by_that_of_some(
    monkeypatch: pytest.MonkeyPatch, allowance: float, most: int, num_bytes: int
) -> None:
    """A product takes two seconds and a thousand numbers, and a run two hundred besides."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def trial(count: int) -> None:
        now[0] += 2 * count
        _besides, _products = [torch.zeros(n, dtype=torch.float32) for n in (200, 1000 * count)]

    assert bytes_of_products(trial, most, 2.0, allowance) == num_bytes


@pytest.mark.parametrize(
    ("most", "told"),
    [(100.0, "012345678"), (3.0, "002444688"), (0.0, "000008888")],
)
def test_of_many_alike_those_that_are_tried_tell_of_the_others(
    monkeypatch: pytest.MonkeyPatch, most: float, told: str
) -> None:
    """Each takes a second, but the first one, which takes a hundred."""
    now, made = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def tell(name: str) -> str:
        now[0] += 1.0 if made else 100.0
        made.append(name)
        return name

    names = "012345678"
    assert of_nearest(dict.fromkeys(names), tell, most) == {
        x: (told, told) for x, told in zip(names, told, strict=True)
    }
    assert of_nearest({}, tell, most) == {}
    assert len(made) == len(set(told))


def test_of_each_kind_one_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def tell(name: str) -> str:
        now[0] += 1.0
        made.append(name)
        return kinds[name]

    kinds = dict(zip("1234567", "abacada", strict=True))
    assert {name: told for name, (told, _) in of_nearest(kinds, tell, 2.5).items()} == kinds
    assert len(made) == 4


def test_those_in_order_are_told_by_the_first_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def tell(name: str) -> str:
        now[0] += 1.0
        made.append(name)
        return name

    kinds = dict(zip("0123", "aabb", strict=True))
    for most, told in ((0.5, "0000"), (1.5, "0022"), (2.5, "0122")):
        assert "".join(other for _, other in of_nearest(kinds, tell, most, in_order=True).values()) == told
    assert "".join(made) == "002021"


def test_seconds_of_work() -> None:
    assert seconds_of(lambda: None) >= 0


@pytest.mark.parametrize(("seconds", "least", "runs"), [([0.01, 0.03, 0.005, 0.02], 0.005, 4), ([2.0, 1.0], 2.0, 1)])
def test_short_trials_are_run_a_few_times(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], least: float, runs: int
) -> None:
    now, made = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += seconds[len(made)]
        made.append(1)

    assert least_seconds_of(work) == pytest.approx(least)
    assert len(made) == runs


@pytest.mark.parametrize(
    ("total", "run", "skipped"), [(10, [range(3), range(3, 6)], 4.0), (6, [range(3), range(3, 6)], 0.0)]
)
def test_of_alike_pieces_the_first_are_run_and_the_others_counted(
    monkeypatch: pytest.MonkeyPatch, total: int, run: list[range], skipped: float
) -> None:
    """A piece takes two seconds, and the first one more."""
    now, made = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    rehearsal = Rehearsal()
    for ids in rehearsal(total, 3):
        made.append(ids)
        now[0] += 2.0 if ids.start else 9.0
    assert (made, rehearsal.skipped) == (run, skipped)
