"""Factors in bfloat16: the bound that is proved, on inputs that come close to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secorder import CurvatureProbe, InvalidArgumentError
from secorder.layers import low_precision
from secorder.layers.contraction import contract_sum
from secorder.layers.low_precision import contract_sum_low, is_low
from secorder.layers.patches import Patches
from secorder.layers.per_sample import Outer, Rows

BOUND = 2.0**-7


def largest_error(a: torch.Tensor, g: torch.Tensor) -> float:
    """Of an entry, relative to that entry, for factors ``(N, groups, 1, k)`` in float32."""
    groups, width, fan_in = g.shape[1], g.shape[3], a.shape[3]
    numel = groups * width * fan_in
    exact = contract_sum([Outer(a.double(), g.double())], numel=numel)
    found = contract_sum_low([Outer(a, g)], numel=numel)
    assert found.dtype is torch.float32
    return float(((found.double() - exact).abs() / exact).max())


@pytest.mark.parametrize("count", [1, 250])
def test_the_worst_factors_are_within_the_bound_and_near_it(count: int) -> None:
    """Squares just below and just above the midpoint between 1 and the next number in bfloat16."""
    for square in (1 + 2.0**-8 - 2.0**-20, 1 + 2.0**-8 + 2.0**-20):
        factor = torch.full((count, 1, 1, 3), square, dtype=torch.float64).sqrt().float()
        error = largest_error(factor, factor)
        assert 0.98 * BOUND < error <= BOUND


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.sampled_from([1, 2, 17, 250]),
    groups=st.integers(1, 2),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_every_entry_is_within_the_bound(seed: int, count: int, groups: int, spread: float) -> None:
    """Whatever the signs and sizes, from one sample to another and from one row to another."""
    generator = torch.Generator().manual_seed(seed)
    a, g = (
        (
            torch.randn(count, groups, 1, k, generator=generator)
            * torch.exp(spread * torch.randn(count, groups, 1, k, generator=generator))
        ).float()
        for k in (5, 4)
    )
    assert largest_error(a, g) <= BOUND


def test_positions_are_rounded_once_where_factors_come_in_bfloat16() -> None:
    a, g = (torch.randn(6, 2, 9, k).bfloat16().float() for k in (5, 4))
    exact = torch.matmul(g.double().transpose(2, 3), a.double()).square().sum(0).flatten()
    found = contract_sum_low([Outer(a, g)], numel=40)
    assert float(((found.double() - exact).abs() / exact).max()) <= BOUND + 1e-4
    images = Patches(torch.randn(3, 2, 5, 5).bfloat16().float(), (3, 3), (1, 1), (1, 1), 1, (3, 1, 9, 18), (0, 0))
    of_images = Outer(images, torch.randn(3, 1, 9, 4).bfloat16().float())
    exact = contract_sum([Outer(images[:].double(), of_images.g.double())], numel=72)
    found = contract_sum_low([of_images], numel=72)
    assert float(((found.double() - exact).abs() / exact).max()) <= BOUND + 1e-4


def test_in_how_many_pieces_samples_are_taken_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Outer(torch.randn(7, 1, 3, 5).float(), torch.randn(7, 1, 3, 4).float())
    whole = contract_sum_low([part], numel=20)
    monkeypatch.setattr(low_precision, "ACCELERATOR_CHUNK_ELEMENTS", 100)
    out = torch.full((20,), torch.nan, dtype=torch.float32)
    assert torch.allclose(contract_sum_low([part], numel=20, out=out, beta=0.0), whole)


def test_what_is_added_to_and_left_out() -> None:
    for positions in (1, 3):
        a, g = torch.randn(6, 1, positions, 5).float(), torch.randn(6, 1, positions, 4).float()
        alone = contract_sum_low([Outer(a, g)], numel=20)
        out = torch.ones(20, dtype=torch.float32)
        contract_sum_low([Outer(a, g)], numel=20, out=out, beta=0.5, alpha=2.0, keep=torch.tensor(True))
        assert torch.allclose(out, 0.5 + 2 * alone)
        a[0] = torch.nan
        contract_sum_low([Outer(a, g)], numel=20, out=out, keep=torch.tensor(False))
        assert torch.allclose(out, 0.5 + 2 * alone)


@pytest.mark.parametrize("positions", [1, 3])
def test_an_empty_batch_adds_nothing_and_what_is_forgotten_may_be_nan(positions: int) -> None:
    empty = Outer(torch.randn(0, 1, positions, 5).float(), torch.randn(0, 1, positions, 4).float())
    out = torch.full((20,), torch.nan, dtype=torch.float32)
    assert not contract_sum_low([empty], numel=20).any()
    assert not contract_sum_low([empty], numel=20, out=out, beta=0.0).any()


def test_other_forms_are_contracted_as_they_are() -> None:
    rows = Rows(torch.randint(4, (5, 3)), torch.randn(5, 3, 2), 4)
    assert torch.equal(contract_sum_low([rows], numel=8), contract_sum([rows], numel=8))
    double = Outer(torch.randn(5, 1, 1, 3), torch.randn(5, 1, 1, 2))
    assert torch.equal(contract_sum_low([double], numel=6), contract_sum([double], numel=6))


def test_it_is_chosen_by_the_device_and_the_dtype_that_a_layer_computes_in() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [is_low("auto", cuda, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, None)] == [
        True,
        True,
        False,
        False,
    ]
    assert not is_low("auto", cpu, torch.bfloat16)
    assert is_low("bfloat16", cpu, torch.float32)
    assert not is_low("float32", cuda, torch.bfloat16)


@pytest.mark.parametrize("tokens", [(), (7,)])
def test_the_online_fisher_in_bfloat16(tokens: tuple[int, ...]) -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(32, *tokens, 6)
    with (
        CurvatureProbe(model, reduction="mean", precision="bfloat16") as low,
        CurvatureProbe(model, reduction="mean") as full,
    ):
        model(inputs).square().flatten(1).sum(1).mean().backward()
        for name, value in low.fisher_diagonal().items():
            expected = full.fisher_diagonal()[name]
            assert not torch.equal(value, expected)
            error = (value - expected).abs()
            assert bool((error <= (BOUND * expected if not tokens else BOUND * expected.max())).all())
        before = low.fisher_diagonal()
        model(inputs * torch.inf).square().flatten(1).sum(1).mean().backward()
        assert all(torch.equal(value, before[name]) for name, value in low.fisher_diagonal().items())
    with pytest.raises(InvalidArgumentError, match="precision must be"):
        CurvatureProbe(model, precision="float16", reduction="mean")  # type: ignore[arg-type]
