"""The search for samples in layers, by passes on one batch."""

import torch
import torch.nn.functional as F
from torch import nn

from secorder import CurvatureProbe
from secorder.layers.layout import Layout
from secorder.layers.selection import select_layers
from secorder.online.samples.search import attribute

from ...helpers import Shared, data, refused_where_nothing_tells
from ...reference import assert_all_close, fisher_by_sample


@refused_where_nothing_tells
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
