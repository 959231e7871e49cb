"""The Monte Carlo Fisher tends to the exact one, and chains are run as they are."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secorder import CurvatureProbe, per_layer_fisher_diagonal, weighted_mean

from ..helpers import mlp, seed, seeded
from ..reference import assert_all_close, fisher_by_sample, ggn_by_sample

N = 6


@pytest.mark.parametrize("loss", ["convex", "not_convex"])
def test_monte_carlo_fisher_tends_to_type_2(loss: str) -> None:
    loss_fn = F.cross_entropy if loss == "convex" else lambda f, t: torch.sin(3 * f).sum(1).mean()
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    exact = per_layer_fisher_diagonal(model, loss_fn, inputs, targets, fisher_type="type-2")

    def error(draws: int) -> float:
        found = per_layer_fisher_diagonal(
            model, loss_fn, inputs, targets, fisher_type="mc", num_draws=draws, generator=seeded()
        )
        return ((found["0"] - exact["0"]).norm() / exact["0"].norm()).item()

    assert error(4000) < 0.05
    assert error(4000) < error(40) < 0.6


def test_monte_carlo_is_reproducible() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    with CurvatureProbe(model) as probe:
        first, second = (
            probe.fisher_diagonal(F.cross_entropy, inputs, targets, fisher_type="mc", num_draws=3, generator=seeded(5))
            for _ in range(2)
        )
    assert_all_close(first, second, 0.0)
    assert {info.num_draws for info in first.info.values()} == {3}  # an estimate, whose error draws do not tell
    both = weighted_mean([first, second], [1, 1]).info["0"]
    assert both.num_draws == 6
    assert all(math.isnan(info.relative_error) for info in (first.info["0"], both))


def in_place(kind: str) -> nn.Sequential:
    """Chains of PyTorch's own modules, which overwrite what layers returned, or call a layer twice."""
    seed()
    relu, first, last = nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 3)
    if kind == "images":
        convolutions = [nn.Conv2d(2, 3, 3, padding=1), relu, nn.BatchNorm2d(3).eval(), nn.Hardtanh(inplace=True)]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(48, 4), nn.Dropout(0.0), nn.Identity(), relu, last)
    if kind == "positions":  # what a linear layer returns is a view there
        return nn.Sequential(first, relu, nn.LayerNorm(4), nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(20, 3), relu)
    if kind == "twice":
        return nn.Sequential(first, relu, first, nn.Tanh(), last)
    tied = nn.Linear(4, 4)
    tied.weight = first.weight
    return nn.Sequential(first, relu, tied, nn.Tanh(), last)


@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
@pytest.mark.parametrize("kind", ["images", "positions", "twice", "tied"])
def test_outputs_of_layers_are_followed_where_they_are_overwritten(kind: str, fisher_type: str) -> None:
    model = in_place(kind)
    shape = {"images": (2, 4, 4), "positions": (5, 4)}.get(kind, (4,))
    inputs, targets = torch.randn(N, *shape), torch.randint(3, (N,))
    by = fisher_by_sample if fisher_type == "empirical" else ggn_by_sample
    reference = (N,) if fisher_type == "empirical" else ()
    expected = by(model, F.cross_entropy, inputs, targets, *reference)
    layers = ["0", "4"] if kind == "tied" else None  # the other use is in a layer that is not looked at
    for loss_fn in (F.cross_entropy, lambda f, t: F.cross_entropy(f, t)):
        with CurvatureProbe(model, None if layers else "all", layers=layers) as probe:
            found = probe.fisher_diagonal(loss_fn, inputs, targets, fisher_type=fisher_type).by_parameter()
        assert_all_close(found, {name: expected[name] for name in found})
        assert len(found) == len(list(model.parameters())) - (kind == "tied")


def test_nothing_is_added_to_what_layers_of_a_chain_return() -> None:
    inputs, targets = torch.randn(N, 2, 4, 4), torch.randint(3, (N,))

    class Adds(TorchDispatchMode):
        shapes: ClassVar[list[torch.Size]] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.add.Tensor:
                self.shapes.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with CurvatureProbe(in_place("images"), "all") as probe, Adds() as adds:
        probe.fisher_diagonal(F.cross_entropy, inputs, targets)
    assert not any(shape[:1] == (N,) for shape in adds.shapes)


@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
def test_wide_chains_in_single_precision(fisher_type: Any) -> None:
    model = nn.Sequential(nn.Linear(160, 256), nn.ReLU(), nn.Linear(256, 224), nn.Tanh(), nn.Linear(224, 5))
    x, t = torch.randn(128, 160), torch.randint(5, (128,))
    expected = per_layer_fisher_diagonal(model, F.cross_entropy, x, t, fisher_type=fisher_type)
    found = per_layer_fisher_diagonal(model.float(), F.cross_entropy, x.float(), t, fisher_type=fisher_type)
    for name, values in expected.items():
        assert (found[name].double() - values).norm() < 1e-5 * values.norm()
