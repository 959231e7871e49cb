"""How long products take, by a clock of our own."""

import pytest

from secorder.oneshot.timing import seconds_of, seconds_per_product


@pytest.mark.parametrize(
    ("allowance", "most", "batches"), [(10.0, 50, [1, 1, 5]), (0.0, 50, [1, 1]), (1e9, 7, [1, 1, 7])]
)
def test_two_trials_tell_what_one_product_takes(
    monkeypatch: pytest.MonkeyPatch, allowance: float, most: int, batches: list[int]
) -> None:
    """A product takes two seconds."""
    now, made = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def trial(count: int) -> None:
        made.append(count)
        now[0] += 2 * count + (100 if len(made) == 1 else 0)  # the first time takes longer

    assert seconds_per_product(trial, most, allowance) == 2.0
    assert made == batches


def test_seconds_of_work() -> None:
    assert seconds_of(lambda: None) >= 0
