"""Where samples are, and whether they are independent."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import CurvatureProbe
from secorder.layers.layout import Layout
from secorder.layers.selection import select_layers
from secorder.layers.structure import independent_by_structure, linear_by_structure
from secorder.oneshot.independence import outputs_independent, separating_masks
from secorder.oneshot.isolation import isolate
from secorder.online.attribution import attribute

from ..helpers import Shared, data
from ..reference import assert_all_close, fisher_by_sample


def test_a_row_that_all_samples_share_is_told_where_the_model_returns_no_samples() -> None:
    class Loss(Shared):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(super().forward(x), t)

    model, batch = Loss(), data()
    with CurvatureProbe(model, layers="shift", reduction="mean") as probe:
        model(*batch).backward()
        found = probe.fisher_diagonal().by_parameter()
    expected = fisher_by_sample(model, lambda loss, _: loss, batch, torch.zeros(6), 6)
    assert_all_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_for_any_two_samples_one_is_replaced_without_the_other(count: int) -> None:
    masks = separating_masks(count)
    for n in range(count):
        for m in range(count):
            assert n == m or bool((masks[:, m] & ~masks[:, n]).any())


class Leaks(nn.Module):
    """One sample influences another."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.fc, self.source, self.target = nn.Linear(4, 3), source, target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.fc(x)
        leak = torch.zeros_like(z)
        leak[self.target] = z[self.source]
        return z + 1e-6 * leak


@pytest.mark.parametrize("pair", [(0, 5), (5, 0), (2, 3)])
def test_one_sample_that_influences_another_is_seen(pair: tuple[int, int]) -> None:
    x, _ = data()
    for model, alone in ((nn.Linear(4, 3), True), (Leaks(*pair), False)):
        with isolate(model, None, []) as isolated:
            assert outputs_independent(isolated, x, len(x), 0) is alone


def test_structure_that_leaves_no_doubt() -> None:
    chain = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.Tanh())
    assert not independent_by_structure(chain)
    chain.eval()
    assert independent_by_structure(chain)
    assert not independent_by_structure(chain, sample_dim=1)
    assert not linear_by_structure(chain, chain[0])
    assert linear_by_structure(chain[:5], chain[0])
    chain[4].register_forward_hook(lambda *_: None)
    assert not independent_by_structure(chain)


class Sequences(nn.Module):
    """Samples in dim 0, in dim 1, and in rows of flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = torch.tanh(self.second(hidden.transpose(0, 1)).transpose(0, 1))
        return self.third(hidden.flatten(0, 1)).view(*x.shape[:2], -1).mean(1)


def test_layouts_are_found() -> None:
    model = Sequences()
    found = attribute(model, select_layers(model), (torch.randn(5, 3, 4),), {}, 0)
    assert not found.coupled
    assert not found.unknown | found.outside
    assert {name: calls[0].layout for name, calls in found.known.items()} == {
        "first": Layout(),
        "second": Layout(1),
        "third": Layout(0, 3, True),
    }
