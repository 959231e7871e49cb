"""The gradient noise scale against brute force: over steps, micro-batches, several forwards, and its meaning."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, NoiseScales
from secorder.online.noise import NoiseScale

from ..helpers import data, make, mlp, step
from ..reference import assert_close, gradients_by_sample

Pair = tuple[float, float]


def brute_force(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Pair:
    """|G|² and tr Σ of all parameters, by one batch."""
    gradients = gradients_by_sample(model, F.cross_entropy, *batch, len(batch[0]))
    rows = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    count = len(rows)
    pairs = rows @ rows.t()
    off = (pairs.sum() - pairs.trace()) / (count * (count - 1))  # ⟨g_n, g_m⟩ of different samples
    return float(off), float(pairs.trace() / count - off)


def check(found: NoiseScales, batches: list[Pair], weights: list[float]) -> None:
    signal, noise = (
        sum(w * batch[i] for w, batch in zip(weights, batches, strict=True)) / sum(weights) for i in (0, 1)
    )
    assert_close(torch.tensor([found.total.squared_norm, found.total.variance]), torch.tensor([signal, noise]))
    assert found.total.value == (found.total.variance / found.total.squared_norm if signal > 0 else math.inf)


@contextmanager
def probes(model: nn.Module, **options: object) -> Iterator[CurvatureProbe]:
    """With every batch's norms taken."""
    with CurvatureProbe(model, **{"accumulate": "trace", "reduction": "mean", **options}) as probe:  # type: ignore[arg-type]
        yield probe


@pytest.mark.parametrize("zero", [True, False])
def test_micro_batches_are_batches_of_their_own(zero: bool) -> None:
    """Whether gradients are accumulated over them or not: what .grad held before is no part of it."""
    model, batches = mlp(), [data(n) for n in (6, 3, 5)]
    with probes(model, loss_scale=1 / 3) as probe:
        for batch in batches:
            if zero:
                model.zero_grad()
            step(model, batch, 1 / 3)
        check(probe.gradient_noise_scale(), [brute_force(model, batch) for batch in batches], [6, 3, 5])
        assert probe.gradient_noise_scale().num_samples == 14


def test_a_sum_and_a_moving_average() -> None:
    model, batches = mlp(), [data(n) for n in (6, 4)]
    with probes(model, reduction="sum", decay=0.9) as probe:
        for batch in batches:
            F.cross_entropy(model(batch[0]), batch[1], reduction="sum").backward()
        check(probe.gradient_noise_scale(), [brute_force(model, batch) for batch in batches], [0.9, 1.0])


def test_hooks_of_the_user_and_frozen_parameters_do_not_enter() -> None:
    model, batch = mlp(), data()
    expected = [brute_force(model, batch)]
    model[0].weight.register_hook(lambda g: 2 * g)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model[4].bias.requires_grad_(False)
    with probes(model) as probe:
        step(model, batch)
        check(probe.gradient_noise_scale(), expected, [1.0])


def test_several_forwards_of_one_backward() -> None:
    """Told as they are, they are batches of their own; where it is not told, the noise is not."""
    model, batches = make(), [data(6), data(4)]
    for forwards in ("separate", None):
        with probes(model, forwards=forwards) as probe:
            sum(F.cross_entropy(model(x), t) for x, t in batches).backward()
            if forwards is None:
                with pytest.raises(AttributionError, match="gradient noise needs"):
                    probe.gradient_noise_scale()
                assert probe.fisher_trace()["0"].num_samples == 10
            else:
                check(probe.gradient_noise_scale(), [brute_force(model, batch) for batch in batches], [6, 4])


def test_samples_that_weigh_differently() -> None:
    model, batch = make(), data(6)
    weights = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.1, 0.1])
    with probes(model, reduction=lambda x: weights) as probe:
        (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * weights).sum().backward()
        check(probe.gradient_noise_scale(), [brute_force(model, batch)], [1.0])


def test_batches_of_one_sample_tell_nothing() -> None:
    model, batches = make(), [data(1), data(5)]
    with probes(model) as probe:
        step(model, batches[1])
        step(model, batches[0])
        check(probe.gradient_noise_scale(), [brute_force(model, batches[1])], [1.0])
        probe.window()
        step(model, batches[0])
        window = probe.window()
        assert window.fisher_trace()["0"].num_samples == 1
        with pytest.raises(AttributionError, match="one sample"):
            window.gradient_noise_scale()
        check(probe.gradient_noise_scale(), [brute_force(model, batches[1])], [1.0])


def test_a_signal_that_is_lost_in_noise() -> None:
    assert NoiseScale.of(-0.1, 1.0).value == math.inf
    assert NoiseScale.of(0.5, 1.0).value == 2.0
    assert math.isnan(NoiseScale.of(math.nan, 1.0).value)


def test_it_is_the_batch_size_at_which_signal_and_noise_are_equal() -> None:
    """Linear regression whose moments are known: tr Σ and |G|² are those of the distribution.

    The inputs have the identity for their second moments, to rounding, so that few of them do.
    """
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.3)
    inputs = torch.randn(30_000, 5)
    moments = inputs.t() @ inputs / len(inputs)
    inputs = torch.linalg.solve_triangular(torch.linalg.cholesky(moments), inputs.t(), upper=False).t()
    with probes(model) as probe:
        for x in inputs.split(50):
            (0.5 * model(x).square()).mean().backward()
        noise = probe.gradient_noise_scale().total
    # g = (w·x) x with E g = w, E ‖g‖² = (d + 2) ‖w‖².
    square = float(model.weight.square().sum())
    assert math.isclose(noise.squared_norm, square, rel_tol=0.05)
    assert math.isclose(noise.variance, 6 * square, rel_tol=0.05)
    assert math.isclose(noise.value, 6.0, rel_tol=0.05)


def test_it_prints_in_few_digits() -> None:
    assert (
        repr(NoiseScale.of(0.5898951693, 12.348018577))
        == "NoiseScale(value=20.93, squared_norm=0.5899, variance=12.35)"
    )
