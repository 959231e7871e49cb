"""Few numbers tell whether all are finite."""

import pytest
import torch
from torch import Tensor

from secorder.layers.per_sample import Outer, PerSample, Rows
from secorder.online.finite import all_finite, finite, total_of, witness

INFINITE = [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("bad", INFINITE)
def test_one_element_among_many(bad: float) -> None:
    g = torch.ones(4, 5)
    assert finite(total_of(g))
    g[2, 3] = bad
    assert not finite(total_of(g))


def test_a_sum_that_the_dtype_cannot_hold_is_finite_all_the_same() -> None:
    assert finite(total_of(torch.full((100,), 6e4, dtype=torch.float16)))


def parts(bad: float) -> list[PerSample]:
    a = torch.ones(3, 1, 2, 4)
    a[1, 0, 0, 2] = bad
    return [Outer(a, torch.zeros(3, 1, 2, 5)), a[:, 0]]


@pytest.mark.parametrize("bad", INFINITE)
@pytest.mark.parametrize("number", [0, 1])
def test_an_infinite_input_shows_although_its_cotangent_is_zero(bad: float, number: int) -> None:
    for value, expected in ((1.0, True), (bad, False)):
        seen = witness(parts(value)[number], None)
        assert seen is not None
        assert bool(finite(seen)) is expected


def test_what_the_audit_has_seen_is_not_looked_at_again() -> None:
    product: Tensor = torch.tensor(float("nan"))
    assert witness(parts(1.0)[0], product) is product
    seen = witness(parts(1.0)[0], product.bfloat16())  # which may have rounded to it
    assert seen is not None
    assert finite(seen)


def test_parts_whose_cotangents_tell_all() -> None:
    g = torch.ones(3, 2, 5)
    assert witness(Rows(torch.zeros(3, 2, dtype=torch.long), g, 4), None) is None
    assert witness(Outer(None, g[:, None]), None) is None


@pytest.mark.parametrize("count", [1, 3, 40])
def test_many_numbers_are_finite_where_each_is(count: int) -> None:
    numbers = [torch.tensor(float(i), dtype=torch.float64 if i % 2 else torch.float32) for i in range(count)]
    assert all_finite(numbers)
    assert not all_finite([*numbers, torch.tensor(torch.inf)])
