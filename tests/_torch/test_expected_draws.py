"""What is drawn element by element is what is expected of it, and the random state stays."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.expected_draws import ExpectedDraws

X = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).view(2, 3)
HALF = torch.full((2, 3), 0.5, dtype=torch.float64)
EMPTY = torch.empty_like(X)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda: F.dropout(X, 0.3), X),
        (lambda: torch.native_dropout(X, 0.3, True)[0], X),
        (lambda: F.dropout1d(X[None], 0.3), X[None]),
        (lambda: torch.rand(2, 3, dtype=torch.float64), HALF),
        (lambda: torch.rand_like(X), HALF),
        (lambda: torch.randn(2, 3, dtype=torch.float64), 0 * X),
        (lambda: torch.randn_like(X), 0 * X),
        (lambda: EMPTY.clone().normal_(3.0, 2.0), 6 * HALF),
        (lambda: EMPTY.clone().uniform_(-1.0, 3.0), 2 * HALF),
        (lambda: EMPTY.clone().exponential_(2.0), HALF * math.log(2.0)),
        (lambda: torch.bernoulli(X), X),
        (lambda: torch.bernoulli(X, 0.2), 0.4 * HALF),
        (lambda: EMPTY.clone().bernoulli_(X), X),
    ],
    ids=lambda x: "",
)
def test_what_is_expected(draw: Callable[[], Tensor], expected: Tensor) -> None:
    state = torch.get_rng_state()
    with torch.no_grad(), ExpectedDraws() as draws:
        found = draw()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(draws.sizes) == 1


def test_sizes_are_told_in_order() -> None:
    with ExpectedDraws() as draws:
        F.dropout(X, 0.5)
        torch.rand(4)
        torch.randperm(5)
    assert draws.sizes == ((2, 3), (4,))


@pytest.mark.parametrize(
    ("draw", "first", "last"),
    [
        (lambda: F.dropout(X, 0.3), X / 10, 1.9 * X),
        (lambda: torch.native_dropout(X, 0.3, True)[0], X / 10, 1.9 * X),
        (lambda: torch.native_dropout(X, 0.3, False)[0], X, X),
        (lambda: torch.rand_like(X), HALF / 10, 1.9 * HALF),
        (lambda: EMPTY.clone().uniform_(-1.0, 3.0), -1.6 * HALF, 5.6 * HALF),
        (
            lambda: EMPTY.clone().normal_(3.0, 2.0),
            HALF * (6 - 4 * 1.6448536269514722),
            HALF * (6 + 4 * 1.6448536269514722),
        ),
        (lambda: torch.randn(2, 3, dtype=torch.float64), -1.6448536269514722 * 2 * HALF, 1.6448536269514722 * 2 * HALF),
        (lambda: EMPTY.clone().exponential_(2.0), 0.05129329438755058 * HALF, 2.995732273553991 * HALF),
        (lambda: torch.bernoulli(X), 0 * X, (X > 0.05).double()),
        (lambda: torch.bernoulli(X, 0.2), 0.04 * HALF, 0.76 * HALF),
        (lambda: EMPTY.clone().bernoulli_(X), 0 * X, (X > 0.05).double()),
    ],
    ids=lambda x: "",
)
def test_what_is_rare(draw: Callable[[], Tensor], first: Tensor, last: Tensor) -> None:
    for at, expected in ((0.05, first), (0.95, last)):
        with torch.no_grad(), ExpectedDraws(at):
            torch.testing.assert_close(draw(), expected, rtol=1e-6, atol=1e-12)
