"""Iterators that a model holds are left alone, and matter only where its forward takes from them."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError
from secorder.online.samples.held_iterators import iterators_kept

from ...helpers import data
from ..loops import follow
from ..twins import bit_for_bit


class Holds(nn.Module):
    """Draws its replayed data outside of the forward, or inside of it."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.fc, self.inside, self.ids = nn.Linear(4, 3), inside, itertools.count()
        self.replayed = iter([1.0, 2.0, 3.0] * 9)
        self.part = nn.Module()
        self.part.later = (n for n in range(9))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (next(self.replayed) if self.inside else 1.0)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def loop(model: Any) -> Iterator[Any]:
    for n in (6, 5, 7):
        value = loss(model, data(n))
        value.backward()
        yield value, next(model.ids), next(model.replayed), next(model.part.later)


def test_what_the_forward_does_not_take_from_is_no_matter() -> None:
    assert follow(Holds(inside=False), [data(n) for n in (6, 5, 7)], loss).exact
    assert bit_for_bit(lambda: Holds(inside=False), loop).num_samples == 18


def test_what_it_takes_from_is_named() -> None:
    probe = bit_for_bit(lambda: Holds(inside=True), loop)
    with pytest.raises(AttributionError, match="an iterator, its attribute 'replayed'"):
        probe.fisher_diagonal()


def test_they_are_back_afterwards() -> None:
    model = Holds(inside=True)
    before = (model.ids, model.replayed, model.part.later)
    with iterators_kept(model) as held:
        assert not held.wanted
        with pytest.raises(RuntimeError, match=r"part\.later"):
            next(model.part.later)
    assert held.wanted == "part.later"
    assert (model.ids, model.replayed, model.part.later) == before
