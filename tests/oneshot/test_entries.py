"""What enters the graph without a gradient: where it tells that samples are independent, and where it must not."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CouplingError, CurvatureProbe
from secorder.oneshot import fisher as oneshot

from ..helpers import run_again_where_nothing_tells, seed
from ..reference import assert_all_close, fisher_of, gradients_by_sample

N, T, W, WORDS = 5, 5, 4, 7


class Words(nn.Module):
    """Ids, and perhaps a mask, through a function of its own."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.words, self.head, self.how = nn.Embedding(WORDS, W), nn.Linear(W, 3), forward
        self.gate = nn.Parameter(torch.randn(T, W))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.how(self, ids, mask).tanh().sum(1))


def attended(m: Any, ids: Tensor, mask: Tensor) -> Tensor:
    x = m.words(ids)[:, None]
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(mask > 0)[:, None, None])[:, 0]


def masked_by_loop(m: Any, ids: Tensor, mask: Tensor) -> Tensor:
    x = m.words(ids)
    for _ in range(3):
        x = (x + m.gate).masked_fill((mask < 1).unsqueeze(-1), 0.5).tanh()
    return x


TOLD: dict[str, Callable[..., Tensor]] = {
    "ids": lambda m, ids, mask: m.words(ids) + m.gate,
    "flattened": lambda m, ids, mask: m.words(ids.view(-1)).view(-1, T, W) * m.gate,
    "time first": lambda m, ids, mask: m.words(ids.t()).transpose(0, 1),
    "positions": lambda m, ids, mask: m.words(ids) + m.words(torch.arange(T)),
    "mask": lambda m, ids, mask: m.words(ids) * mask.unsqueeze(-1),
    "mask, made anew": masked_by_loop,
    "attention": attended,
    "other end": lambda m, ids, mask: m.words(ids) * (~(mask > 0)).add(1.0).unsqueeze(-1),
    "changed in place": lambda m, ids, mask: m.words(plus_one(ids)) + m.gate,
    "where": lambda m, ids, mask: torch.where(mask[..., None] > 0, m.words(ids), m.gate),
    "length": lambda m, ids, mask: m.words(ids) * (1.0 / mask.sum(1))[:, None, None],
}

COUPLED: dict[str, Callable[..., Tensor]] = {
    "next sample's": lambda m, ids, mask: m.words(ids.roll(1, 0)),
    "transposed": lambda m, ids, mask: m.words(ids.t()),
    "of all": lambda m, ids, mask: m.words(ids) * mask.sum(),
    "number read": lambda m, ids, mask: m.words(ids) * ids.sum().item(),
    "branch": lambda m, ids, mask: m.words(ids) * (2.0 if bool(ids.sum() > 4 * ids[0].sum()) else 1.0),
    "late": lambda m, ids, mask: (m.words(ids) + m.gate).exp() * mask.roll(1, 0).unsqueeze(-1),
    "in place": lambda m, ids, mask: m.words(ids).mul_(mask.roll(1, 0).unsqueeze(-1)),
    "set": lambda m, ids, mask: setting(m.words(ids) * 1, mask.roll(1, 0)),
    "through a buffer": lambda m, ids, mask: m.words(written(ids)),
    "through numpy": lambda m, ids, mask: m.words(torch.from_numpy(ids.numpy()[::-1].copy())),
    "through a list": lambda m, ids, mask: m.words(torch.tensor(ids.tolist()[::-1])),
    "vmap": lambda m, ids, mask: m.words(torch.vmap(lambda x: x + 0, 1, 0)(ids)),
    "shared": lambda m, ids, mask: m.words(ids) @ m.words(ids[:, :1]).flatten(0, 1).t() @ m.gate,
}


def plus_one(ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids += 1
    ids %= WORDS
    return ids.add_(0)


def setting(x: Tensor, mask: Tensor) -> Tensor:
    x[:, :, 0] = mask
    return x


def written(ids: Tensor) -> Tensor:
    place = torch.zeros(N, T, dtype=torch.long)
    rows = place.view(-1)
    place[1:] = ids[:-1]
    return rows.view(N, T)


def made(forward: Callable[..., Tensor]) -> tuple[nn.Module, Any, Tensor]:
    seed()
    model = Words(forward).double()
    ids = torch.randint(WORDS, (N, T))
    ids[0] = 1
    mask = (torch.arange(T) < torch.tensor([2, 5, 3, 4, 1])[:, None]).double()
    return model, (ids, mask), torch.randint(3, (N,))


@run_again_where_nothing_tells
@pytest.mark.parametrize("name", TOLD)
def test_independence_is_told_without_another_forward(name: str) -> None:
    model, inputs, targets = made(TOLD[name])
    expected = fisher_of(gradients_by_sample(model, F.cross_entropy, inputs, targets, N))
    with CurvatureProbe(model, "all") as probe, mock.patch.object(oneshot, "require_independent_samples") as asked:
        found = probe.fisher_diagonal(F.cross_entropy, inputs, targets)
    assert not asked.called
    assert_all_close(found.by_parameter(), expected)


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_are_noticed(name: str) -> None:
    model, inputs, targets = made(COUPLED[name])
    with CurvatureProbe(model, "all") as probe, pytest.raises(CouplingError):
        probe.fisher_diagonal(F.cross_entropy, inputs, targets)


@run_again_where_nothing_tells
def test_what_is_in_the_graph_is_not_computed_again() -> None:
    """Though a mask enters late; an attribute of what is in it is asked for, and is as it was."""

    def late(m: Any, ids: Tensor, mask: Tensor) -> Tensor:
        x = m.words(ids).transpose(0, 1)
        x = (x if x.is_contiguous() else x.contiguous()).asinh().transpose(0, 1)
        return x * (torch.zeros_like(x[..., 0]) + mask).unsqueeze(-1)

    model, inputs, targets = made(late)
    expected = fisher_of(gradients_by_sample(model, F.cross_entropy, inputs, targets, N))
    with torch.autograd.profiler.profile() as once:
        model(*inputs)
    with CurvatureProbe(model, "all") as probe, torch.autograd.profiler.profile() as watched:
        found = probe.fisher_diagonal(F.cross_entropy, inputs, targets)
    bare, ours = ([e.name for e in p.function_events].count("aten::asinh") for p in (once, watched))
    assert bare == ours > 0
    assert_all_close(found.by_parameter(), expected)


def test_a_model_that_takes_samples_in_one_order_alone() -> None:
    def by_length(m: Any, ids: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1)
        assert bool((lengths[1:] <= lengths[:-1]).all()), "must be sorted"
        return m.words(ids) * mask.unsqueeze(-1)

    model, (ids, _), targets = made(by_length)
    mask = (torch.arange(T) < torch.tensor([5, 4, 3, 2, 1])[:, None]).long()
    expected = fisher_of(gradients_by_sample(model, F.cross_entropy, (ids, mask), targets, N))
    with CurvatureProbe(model, "all") as probe:
        found = probe.fisher_diagonal(F.cross_entropy, (ids, mask), targets)
    assert_all_close(found.by_parameter(), expected)
