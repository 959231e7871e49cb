"""Samples given by integers alone, which a model transposes, shifts or pads before it looks them up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from secorder.online.samples.integers import ChangedIntegers, mixed

from ...helpers import Net
from ..loops import follow


def shifted(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return m.table(y.T.masked_fill_(y.T == 6, 2))


#: What makes time-major features of batch-first token ids.
LOOKED_UP: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transposed": lambda m, x: m.table(x.T),
    "in memory": lambda m, x: m.table(x.t().contiguous()),
    "shifted": shifted,
    "padded": lambda m, x: m.table(F.pad(x, (1, 0), value=1).T)[1:],
    "begun": lambda m, x: m.table(torch.cat([torch.ones(len(x), 1, dtype=torch.long), x[:, :-1]], 1).T),
    "step by step": lambda m, x: torch.stack([m.table(t) for t in x.unbind(1)]),
    "one by one": lambda m, x: m.table(x.T.reshape(-1)).view(*x.T.shape, -1),
    "in a table of its own": lambda m, x: m.table.weight[x.T],
    "selected": lambda m, x: m.table.weight.index_select(0, x.T.flatten()).view(*x.T.shape, -1),
    "as vectors": lambda m, x: F.one_hot(x.T, 7).to(m.table.weight.dtype) @ m.table.weight,
    "as numbers": lambda m, x: x.T[..., None] / 7 * m.table.weight[0],
}


@pytest.mark.parametrize("sizes", [((5, 5), (4, 2)), ((2, 2), (3, 3), (1, 3), (4, 3))], ids=str)
@pytest.mark.parametrize("name", LOOKED_UP)
def test_as_many_positions_as_samples(name: str, sizes: tuple[tuple[int, int], ...]) -> None:
    """Neither the first batch nor its sizes tell them apart, but which outputs change with which samples."""
    model = Net(
        lambda m, x: m.head(m.rnn(LOOKED_UP[name](m, x))[0]).transpose(0, 1),
        table=nn.Embedding(7, 4),
        rnn=nn.GRU(4, 5),
        head=nn.Linear(5, 3),
    )
    batches = [(torch.randint(1, 7, shape), torch.randint(3, shape)) for shape in sizes]
    came = follow(
        model, batches, lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()), layer_types="all"
    )
    assert came.exact


def test_those_of_changed_samples_alone_are_changed() -> None:
    x, table = torch.arange(1, 7).view(3, 2), torch.randn(7, 4)
    rows = WeakTensorKeyDictionary()
    mask = torch.tensor([False, True, False])
    rows[x] = mask, 0
    with ChangedIntegers(mask, rows, 0, alike=False):
        later = x.T + 0
        later[0] = 3
        looked_up, real = F.embedding(later, table), x.double()
        other = F.embedding(torch.arange(3), table)
    plain = table[torch.tensor([[3, 3, 3], [2, 4, 6]])]
    assert torch.equal((looked_up != plain).any(-1), torch.tensor([[False, False, False], [False, True, False]]))
    assert torch.equal((real != x).any(1), mask)
    assert torch.equal(other, table[:3])
    assert torch.equal(x, torch.arange(1, 7).view(3, 2))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("length", [3, 4])
def test_a_sample_gets_the_same_numbers_whichever_others_are_changed(length: int, alike: bool) -> None:
    """Also where a first position, that all samples share, is not changed: by which the effects of two parts add up."""
    x, table = torch.randint(7, (4, length)), torch.randn(7, 5)
    part = torch.tensor([True, False, False, True])
    found = []
    for mask in (part, ~part, torch.ones_like(part)):
        rows = WeakTensorKeyDictionary()
        rows[x] = mask, 0
        with ChangedIntegers(mask, rows, 0, alike=alike):
            later = torch.zeros_like(x)
            later[:, 1:] = x[:, :-1]
            found.append(F.embedding(later, table))
    first, second, both = found
    assert torch.equal(both, torch.where(part[:, None, None], first, second))


def test_other_numbers() -> None:
    x, mask = torch.arange(1.0, 7.0).view(2, 3), torch.tensor([True, False, False])
    assert torch.equal(mixed(x, 1, mask, alike=True), x)
    assert torch.equal(mixed(x, 1, mask, alike=False)[:, 0], x[:, 2] * 1.03125)
    assert bool((mixed(0 * x, 1, mask, alike=False)[:, 0] != 0).all())
