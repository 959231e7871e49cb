"""Sums of squares of one layer, with what counts and what does not."""

import torch
from torch import nn

from secorder.layers.per_sample import Outer
from secorder.layers.selection import select_layers
from secorder.online.sums import LayerSums

from ..reference import assert_close


def test_what_is_added_counted_and_left_out() -> None:
    (layer,) = select_layers(nn.Sequential(nn.Linear(4, 3)))
    a, g = torch.randn(5, 1, 1, 4), torch.randn(5, 1, 1, 3)
    squares = torch.einsum("nj,ni->ji", g[:, 0, 0] ** 2, a[:, 0, 0] ** 2).flatten()
    sums = LayerSums.empty(layer, None, None)
    for good in (None, torch.tensor(True), torch.tensor(False)):
        sums.add(layer, [[Outer(a, g)], [Outer(None, g)]], decay=None, alpha=2.0, good=good)
        sums.count(5, good, None)
    assert_close(sums.sums[0], 4 * squares)
    assert_close(sums.sums[1], 4 * (g[:, 0, 0] ** 2).sum(0))
    assert sums.counts.tolist() == [10, 10, 2]
    assert sums.batches == 3


def test_sums_follow_a_layer_that_gets_memory() -> None:
    (layer,) = select_layers(nn.Sequential(nn.Linear(4, 3, device="meta")))
    sums = LayerSums.empty(layer, None, None)
    (moved,) = select_layers(nn.Sequential(nn.Linear(4, 3)))
    sums.follow(moved, None, None)
    assert {t.device.type for t in (*sums.sums, sums.counts)} == {"cpu"}
    assert not any(t.any() for t in (*sums.sums, sums.counts))
