"""Factors of several layers, each by itself, against per-sample gradients that are written out."""

import pytest
import torch
from torch import Tensor, nn

from secorder.layers.one_by_one import OneByOne, Vectors
from secorder.layers.rank_one import RankOne
from secorder.layers.selection import select_layers

N = 40
MODEL = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False), nn.Linear(3, 5))
BIASED = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def layers() -> list[RankOne]:
    found = []
    for layer in select_layers(MODEL, None):
        out, width = layer.parameters["weight"].shape
        a, g = torch.randn(N, width), torch.randn(N, out)
        found.append(RankOne(layer, a, g, [a._version, g._version]))
    return found


def written_out(one: RankOne) -> Tensor:
    """Per-sample gradients of weight and bias, the bias as a weight of an input of one; shape (N, out, in)."""
    ones = torch.ones(N, int("bias" in one.layer.parameters))
    return one.cotangents[:, :, None] * torch.cat([one.inputs, ones], 1)[:, None]


@pytest.mark.parametrize("bad", [None, "inputs", "cotangents", "too large"])
@pytest.mark.parametrize("squared", [True, False])
def test_what_they_tell_is_what_is_written_out(squared: bool, bad: str | None) -> None:
    """All of one layer is looked at, some rows of another one, and of the last nothing."""
    every = layers()
    if bad is not None:
        every[1][1 + (bad == "cotangents")][2, 1] = 1e200 if bad == "too large" else torch.inf
    looks = [Vectors(torch.randn(2), torch.randn(4), 3, 5), Vectors(torch.randn(3), torch.randn(6), 0, 3), None]
    norms = None if squared else [one.norms() for one in every]
    together, grads = OneByOne(every, norms), [written_out(one) for one in every]
    good = [True, bad is None, True]
    found = together.finite()
    assert (found is None) if all(good) else (found is not None and found.tolist() == good)
    values, sizes = together.explained(looks, BIASED)
    assert len(values) == len(sizes) == 2
    for i, (one, look) in enumerate(zip(every, looks, strict=True)):
        if not good[i]:
            assert not sizes[i].isfinite()  # so that nothing differs by more
            continue
        if look is not None:
            rows = slice(look.start, look.start + len(look.r))
            whole = torch.cat([look.s, torch.ones(int(BIASED[i]))])
            torch.testing.assert_close(values[i], look.r @ grads[i].sum(0)[rows] @ whole)
            of_inputs = one.inputs.square().sum() + N * BIASED[i]
            torch.testing.assert_close(sizes[i], one.cotangents[:, rows].square().sum() * of_inputs)
    if squared:
        outs = [{name: torch.ones(p.numel()) for name, p in one.layer.parameters.items()} for one in every]
        together.add_to(outs, beta=0.5, alpha=3.0)
        for i, own in enumerate(outs):
            found = torch.cat(
                [own["weight"].view(grads[i].shape[1], -1)] + [x[:, None] for x in list(own.values())[1:]], 1
            )
            torch.testing.assert_close(
                found, 0.5 + 3 * grads[i].square().sum(0) if good[i] else torch.full_like(found, 0.5)
            )
