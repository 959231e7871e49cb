"""What the audit takes for rounding is what rounding can be: no false alarm where sums are long."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe
from secorder.online.audit.rounding import UNITS, tolerance_of
from secorder.online.reading import unreadable

from ...reference import relative_error


@pytest.mark.parametrize(("inputs", "outputs"), [(1 << 16, 2), (2, 1 << 16), (1 << 20, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_many_random_terms_raise_no_false_alarm(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Of equal inputs, products with random numbers add up like random walks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs)).to(dtype)
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(20):
            model(torch.full((3, inputs), 0.5, dtype=dtype)).square().sum(1).mean().backward()
        assert probe.fisher_diagonal()["0"].isfinite().all()


def test_short_sums_are_held_to_a_few_units() -> None:
    value = torch.zeros((), dtype=torch.float64)
    units = [
        tolerance_of(value, torch.float64, None, ("product",), terms) / torch.finfo(torch.float64).eps
        for terms in (1, 256, 4096)
    ]
    assert units == [UNITS, UNITS, 3 * 64]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_many_equal_rows_raise_no_false_alarm(accumulate: str, layers: int, rows: int) -> None:
    """Sums of N equal numbers round by up to N/8 units in the last place: samples' rows, or those of positions."""
    count = 4096
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)]).float()
        x = torch.randn(8).float().expand(count // rows, rows, 8).squeeze(1).contiguous()
        with CurvatureProbe(model, reduction="mean", accumulate=accumulate) as probe:
            for _ in range(3):
                model(x).cos().flatten(1).mean(1).mean().backward()
            assert all(trace.value > 0 for trace in probe.fisher_trace().values())


def test_a_penalty_on_many_equal_rows_is_seen() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).float()
    x = torch.randn(8).float().expand(4096, 8)
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(3):
            (model(x).cos().mean(1).mean() + 1e-2 * model[0].weight.square().sum()).backward()
        with pytest.raises(AttributionError, match="outside"):
            probe.fisher_diagonal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("second", [nn.InstanceNorm2d(8), nn.GroupNorm(8, 8), nn.InstanceNorm2d(8, affine=True)])
def test_what_a_normalisation_takes_off_raises_no_false_alarm(second: nn.Module, dtype: torch.dtype) -> None:
    """The parameters of the one before change nothing: of their gradients, rounding is left."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), second, nn.ReLU()).to(dtype)
        with CurvatureProbe(model, reduction="mean", layer_types="all") as probe:
            for _ in range(3):
                model(torch.randn(6, 3, 8, 8, dtype=dtype)).square().flatten(1).mean(1).mean().backward()
            found = probe.fisher_diagonal()
            assert float(found["1"].max()) < 1e-6 * float(found["0"].max())


class Shifted(nn.Module):
    """Adds one number to all logits, which a softmax takes off again."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shift = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x) + self.shift
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_a_softmax_takes_off_raises_no_false_alarm(dtype: torch.dtype) -> None:
    """Each sample's gradient is a sum that cancels; what is not zero of it, a penalty say, is seen all the same."""
    for penalty in (0.0, 1e-4):
        model = Shifted().to(dtype)
        with CurvatureProbe(model, reduction="mean", layer_types="all") as probe:
            for _ in range(4):
                loss = F.cross_entropy(model(torch.randn(6, 4, dtype=dtype)), torch.randint(3, (6,)))
                (loss + penalty * model.shift).backward()
            assert set(unreadable(probe._fisher)) == ({""} if penalty else set())


def test_a_penalty_on_a_normalisation_is_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()).float()
    with CurvatureProbe(model, reduction="mean", layer_types="all") as probe:
        for _ in range(3):
            loss = model(torch.randn(6, 3, 8, 8).float()).square().flatten(1).mean(1).mean()
            (loss + 1e-4 * model[1].weight.square().sum()).backward()
        with pytest.raises(AttributionError, match="outside"):
            probe.fisher_diagonal()


def with_normalised_weight(new: bool) -> nn.Module:
    """As the first convolution of a vocoder of one channel, whose directions have one element each."""
    norm = nn.utils.parametrizations.weight_norm if new else nn.utils.weight_norm
    return nn.Sequential(norm(nn.Conv1d(1, 8, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)).float()


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_directions_of_one_element_raise_no_false_alarm(accumulate: Any, new: bool) -> None:
    """The normalised weight does not depend on them: of their gradients, rounding is left."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = with_normalised_weight(new)
        with CurvatureProbe(model, "all", reduction="mean", accumulate=accumulate) as probe:
            for _ in range(10):
                model(torch.randn(6, 1, 3).float()).square().sum(1).mean().backward()
            assert probe.fisher_trace()["0"].value > 0


def test_a_penalty_on_directions_alone_is_seen() -> None:
    torch.manual_seed(0)
    model = with_normalised_weight(True)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(3):
            loss = model(torch.randn(6, 1, 3).float()).square().sum(1).mean()
            (loss + 1e-4 * model[0].parametrizations.weight.original1.square().sum()).backward()
        with pytest.raises(AttributionError, match="outside"):
            probe.fisher_diagonal()


@pytest.mark.parametrize(
    ("dtype", "inside"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_parts_that_compute_with_fewer_digits_raise_no_false_alarm(dtype: torch.dtype, inside: torch.dtype) -> None:
    """As norms do that are written by hand for half precision, when the model is run in another one."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(5, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            low = x.to(inside)
            return (low * torch.rsqrt(low.square().mean(-1, keepdim=True)) * (1 + self.weight.to(inside))).to(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Norm(), nn.Linear(5, 2)).to(dtype)
    x, t = torch.randn(8, 4, dtype=dtype), torch.randn(8, 2, dtype=dtype)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(5):
            nn.functional.mse_loss(model(x), t).backward()
        found, expected = probe.fisher_diagonal(), probe.fisher_diagonal(nn.functional.mse_loss, x, t)
    assert relative_error(found["1"], expected["1"]) < 100 * torch.finfo(inside).eps
