"""Norms of per-sample gradients: what is told of them, and of bad batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, NonFiniteError

from ..benchmarks.memory import peak_memory
from ..helpers import Net, data, make, mlp, seed, step
from ..reference import assert_close, gradients_by_sample


def squares_by_sample(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """‖∂ℓ_n/∂θ‖² of all layers together, by brute force."""
    gradients = gradients_by_sample(model, F.cross_entropy, *batch, len(batch[0]))
    return torch.cat([g.flatten(1) for g in gradients.values()], 1).square().sum(1)


def test_no_tensor_of_the_parameters_size_is_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    with CurvatureProbe(model, accumulate="trace", reduction="mean") as probe:
        F.cross_entropy(model(torch.randn(4, 64)), torch.randint(3, (4,))).backward()
        assert max(value.numel() for value in probe.state_dict().values()) < 64


def test_the_whole_gradient_of_a_layer_without_a_rule_is_not_formed_again() -> None:
    model, x = nn.GRU(40, 128, 2, batch_first=True), torch.randn(64, 20, 40)
    peaks = []
    for accumulate in ("trace", "diagonal"):
        with CurvatureProbe(model, "all", accumulate=accumulate, reduction="mean"):

            def run() -> None:
                model.zero_grad()
                model(x)[0][:, -1].square().mean(1).mean().backward()

            for _ in range(5):  # of which 1, 2 and 4 are verified
                run()
            peaks.append(peak_memory(run))
    assert peaks[0] < 1.02 * peaks[1]


@pytest.mark.parametrize("accumulate", ["trace", "diagonal"])
def test_bad_batches_are_left_out_counted_or_raised_for(accumulate: str) -> None:
    model, good, bad = mlp(), data(), data()
    bad[0][1] = torch.inf
    with CurvatureProbe(model, accumulate=accumulate, reduction="mean", strict=True) as probe:
        for batch in (good, bad):
            step(model, batch)
        assert probe.num_skipped == dict.fromkeys(probe.layer_names, 1)
        assert probe.num_samples == 6
        total = sum(trace.value for trace in probe.fisher_trace().values())
        assert_close(torch.tensor(total), squares_by_sample(model, good).mean())
    model.zero_grad()
    with CurvatureProbe(model, accumulate=accumulate, on_nonfinite="raise", strict=True) as probe:
        step(model, good)
        with pytest.raises(NonFiniteError):
            step(model, bad)


def test_bad_batches_that_are_kept_are_counted() -> None:
    model, bad = mlp(), data()
    bad[0][1] = torch.inf
    with CurvatureProbe(model, accumulate="trace", reduction="mean", on_nonfinite="keep") as probe:
        step(model, data())
        step(model, bad)
        assert all(x.value != x.value and x.num_samples == 12 for x in probe.fisher_trace().values())


def test_a_layer_that_the_loss_does_not_depend_on_has_none() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    model = Unused()
    with CurvatureProbe(model, accumulate="trace", reduction="mean") as probe:
        for _ in range(2):
            step(model, data())
        trace, noise = probe.fisher_trace()["unused"], probe.gradient_noise_scale()["unused"]
        assert (trace.value, trace.standard_error, trace.num_samples) == (0.0, 0.0, 12)
        assert (noise.squared_norm, noise.variance) == (0.0, 0.0)


def test_a_moving_average_of_samples_that_do_not_count() -> None:
    """Samples without a loss have no part in either number, with decay as without."""
    model, batch = make(), data(6)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])

    def reduction(x: Tensor) -> Tensor:
        return weights / weights.sum()

    expected = squares_by_sample(model, batch)[:4].mean()
    for accumulate in ("trace", "diagonal"):
        for decay in (None, 0.5):
            with CurvatureProbe(model, accumulate=accumulate, reduction=reduction, decay=decay) as probe:
                losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
                (losses * reduction(batch[0])).sum().backward()
                total = sum(trace.value for trace in probe.fisher_trace().values())
                assert_close(torch.tensor(total), expected)


def test_the_norm_of_a_tied_layer_is_seen_once_a_batch() -> None:
    """Also where gradients are zeroed in place, so that they are not read at the end."""
    found = []
    for none in (True, False):
        seed()
        model = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
        model.b.weight = model.a.weight
        with CurvatureProbe(model, accumulate="trace", reduction="mean") as probe:
            for _ in range(6):
                model.zero_grad(set_to_none=none)
                F.cross_entropy(model(torch.randn(8, 4)), torch.randint(4, (8,))).backward()
            found.append({name: scale.value for name, scale in probe.gradient_noise_scale().items()})
    assert found[0] == pytest.approx(found[1], rel=1e-12)
