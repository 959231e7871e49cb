"""Do samples act on one another?"""

import pytest
import torch
from torch import Tensor, nn

from secorder import CouplingError, per_layer_fisher_diagonal
from secorder.layers.layout import DIM_ZERO, Layout
from secorder.oneshot.independence import (
    block_diagonal,
    changed_entries,
    changed_samples,
    linear_products,
    outputs_independent,
    over_samples,
    rounding_in,
    rows_weighted,
    sample_bits,
    sample_weights,
    separating_masks,
    weight_draws,
    with_neighbours,
    without_gradients,
)
from secorder.oneshot.isolation import isolate

from ..helpers import Fn, data, make, seeded


@pytest.mark.parametrize("count", [1, 2, 3, 6, 11, 64])
def test_masks_separate_every_ordered_pair_and_bits_every_pair(count: int) -> None:
    masks, bits = separating_masks(count), sample_bits(count)
    for n in range(count):
        for m in range(count):
            if n != m:
                assert (masks[:, m] & ~masks[:, n]).any()
                assert (bits[:, m] != bits[:, n]).any()
    assert len(masks) <= 2 * count.bit_length() + 1


@pytest.mark.parametrize("sender", range(5))
def test_one_sample_that_acts_on_one_other_is_seen(sender: int) -> None:
    def leaks(h: Tensor) -> Tensor:
        return h + 1e-3 * torch.eye(6)[(sender + 3) % 6][:, None] * h[sender]

    x, _ = data()
    for function, expected in ((torch.tanh, True), (leaks, False)):
        with isolate(make(Fn(function)), None, []) as isolated:
            assert outputs_independent(isolated, x, 6, 0) is expected


def test_changes_beyond_rounding() -> None:
    before = torch.tensor([1.0, 1.0, torch.inf, -torch.inf, torch.nan])
    after = torch.tensor([1.0 + 1e-16, 1.0 + 1e-6, torch.inf, torch.inf, torch.nan])
    assert changed_entries(before, after).tolist() == [False, True, False, True, False]
    assert changed_entries(torch.tensor([1j, 1j]), torch.tensor([1j, 1 + 1j])).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("kept", [0.0, float("inf"), float("nan")])
def test_samples_of_changed_entries(dtype: torch.dtype, kept: float) -> None:
    before = torch.randn(6, 4, 3, dtype=dtype)
    before[2, 1] = kept
    after = before.clone()
    after[4, 2, 1] += 1
    after[3, 3, 0] = float("nan")
    layouts = [Layout(0), Layout(0, 2, True), Layout(0, 2, False), Layout(1)]
    found = changed_samples(before, after, layouts, rounding_in(before))
    entries = changed_entries(before, after)
    for layout, by_sample in zip(layouts, found, strict=True):
        assert by_sample.tolist() == layout.split(entries).flatten(1).any(1).tolist()
    assert found[0].tolist() == [False, False, False, True, True, False]
    for shape in ((6,), (6, 0)):
        x = torch.randn(shape, dtype=dtype)
        assert changed_samples(x, x + 1, [Layout()], rounding_in(x))[0].tolist() == [bool(x.numel())] * 6


def test_neighbours_replace_the_chosen_samples_alone() -> None:
    x, mask = torch.ones(3, 2), torch.tensor([False, True, False])
    assert with_neighbours(mask, 3, 0, x)[:, 0].tolist() == [1, 1.03125, 1]
    ids = torch.tensor([[5, 6, 7]])
    assert with_neighbours(mask, 3, 1, ids).tolist() == [[5, 5, 7]]
    shared = torch.ones(4, 4)
    assert with_neighbours(mask, 3, 0, shared) is shared
    lengths = torch.tensor([9, 8, 5, 4, 2])
    for mask, expected in (([1, 1, 0, 1, 0], [5, 5, 5, 5, 2]), ([0, 1, 1, 0, 1], [9, 9, 9, 4, 4])):
        assert with_neighbours(torch.tensor(mask).bool(), 5, 0, lengths, in_order=True).tolist() == expected


def test_samples_that_may_not_change_their_order() -> None:
    def sorted_alone(x: Tensor) -> Tensor:
        if not bool((x[1:, 0] <= x[:-1, 0]).all()):
            raise ValueError("sort them first")
        return x.sin()

    x = torch.arange(6.0).flip(0)[:, None].expand(-1, 4).clone()
    for function, expected in ((sorted_alone, True), (lambda x: sorted_alone(x) + x[3].sin(), False)):
        with isolate(nn.Sequential(Fn(function)), None, []) as isolated:
            found = outputs_independent(isolated, x.long(), 6, 0, lambda ids: isolated.forward(ids.double()))
            assert found is expected


def test_values_are_spread_over_samples() -> None:
    assert over_samples(torch.arange(6.0).view(2, 3), torch.zeros(3, 4), DIM_ZERO)[1, :, 3].tolist() == [3, 4, 5]


@pytest.mark.parametrize("layout", [Layout(0), Layout(1), Layout(0, 2, True), Layout(0, 2, False), Layout(1, 2)])
def test_rows_are_weighted_as_their_samples_are(layout: Layout) -> None:
    plain, weights = torch.randn(3, 6, 6), torch.rand(6 // layout.rows) + 0.5
    weighted = plain * over_samples(weights[None], plain[0], layout)
    assert rows_weighted(plain, weighted, weights, layout).tolist() == [True] * 3
    weighted[1, 4, 4] += 1e-3
    assert rows_weighted(plain, weighted, weights, layout).tolist() == [True, False, True]
    assert rows_weighted(plain, weighted, weights, layout, noise=torch.tensor(1e-2)).all()
    assert rows_weighted(plain, weighted, weights, layout, kind=torch.bfloat16).all()
    assert not rows_weighted(plain, weighted + 10, weights, layout, noise=torch.tensor(1e2)).any()
    other = layout._replace(sample_major=not layout.sample_major) if layout.rows > 1 else Layout(1 - layout.dim)
    assert not rows_weighted(plain, weighted, weights, other).any()
    assert rows_weighted(plain[:, :0, :0], plain[:, :0, :0], weights[:0], layout).all()


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_weights_of_few_samples_are_far_apart(count: int) -> None:
    for seed in range(50):
        weights = sample_weights(count, torch.Generator().manual_seed(seed)).sort().values
        assert ((weights >= 0.5) & (weights < 2)).all()
        assert (weights.diff() > 0.75 / count * 0.99).all()


def test_powers_of_two_tell_samples_apart_and_round_nothing() -> None:
    draws = torch.stack([sample_weights(64, torch.Generator().manual_seed(seed), powers=True) for seed in range(3)])
    assert (draws.frexp().mantissa == 0.5).all()
    assert ((draws >= 0.25) & (draws <= 32)).all()
    few = torch.randn(64).bfloat16()
    assert ((few * draws.bfloat16()).double() == few.double() * draws).all()
    assert len(set(map(tuple, draws.T.tolist()))) > 56


def test_half_precision_is_looked_at_more_often() -> None:
    assert weight_draws([torch.zeros(1)]) == 1
    assert weight_draws([torch.zeros(1, dtype=torch.bfloat16)]) == 3


def test_a_run_without_gradients_unless_it_needs_them() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not without_gradients(torch.sin, x).requires_grad
    assert without_gradients(lambda x: torch.autograd.grad((x**2).sum(), x)[0], x).tolist() == [2, 2, 2]


@pytest.mark.parametrize("coupling", [0.0, 1e-300, 1.0])
def test_a_hessian_between_samples_is_exactly_zero_or_seen(coupling: float) -> None:
    z = torch.randn(5, 3, requires_grad=True)
    loss = z.sin().sum(1).square().sum() + coupling * z[1, 0] * z[4, 2]
    g = torch.autograd.grad(loss, z, create_graph=True)
    assert block_diagonal(g, [z], seeded()) is (coupling == 0)


def test_products_of_a_backward_that_clamps_are_not_linear() -> None:
    z = torch.randn(5, 3, requires_grad=True)
    for clamps in (False, True):
        h = z.sin()
        g = torch.autograd.grad(h.square().sum(), z, create_graph=True)
        if clamps:
            g[0].register_hook(lambda v: v.clamp(-0.1, 0.1))
        assert linear_products(g, [z], seeded()) is not clamps


@pytest.mark.parametrize("count", [3, 4, 5, 6, 16])
def test_a_scale_by_the_largest_number_of_the_batch_is_seen_whoever_holds_it(count: int) -> None:
    model = nn.Sequential(Fn(lambda x: (x / x.abs().max() * 127).round() / 127), nn.Linear(3, 2))
    for holder in range(count):
        x = torch.randn(count, 3)
        x[holder] *= 10
        with isolate(model, None, []) as isolated:
            assert not outputs_independent(isolated, x, count, 0)
        with pytest.raises(CouplingError):
            per_layer_fisher_diagonal(model, nn.functional.mse_loss, x, torch.randn(count, 2))


def test_outputs_of_one_sample_each() -> None:
    x = torch.randn(6, 4)
    with isolate(Fn(lambda x: x.unbind()), None, []) as isolated:
        assert outputs_independent(isolated, x, 6, 0)
