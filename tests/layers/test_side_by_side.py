"""Factors of several layers side by side in one matrix, against each layer by itself."""

import pytest
import torch
from torch import Tensor

from secorder.layers.side_by_side import Frame, SideBySide, columns_of, frame_of

SHAPES = [(4, 3), (2, 5), (3, 3)]
BIASED = [True, False, True]


def factors() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, width), torch.randn(6, out)) for width, out in SHAPES]


def frame() -> tuple[Frame, list[tuple[Tensor, Tensor]]]:
    vectors = [(torch.randn(out), torch.randn(width)) for width, out in SHAPES]
    return frame_of(vectors, torch.tensor([float(biased) for biased in BIASED])), vectors


def written_out(a: Tensor, g: Tensor, biased: bool) -> Tensor:
    """Per-sample gradients of weight and bias, the bias as a weight of an input of one; shape (N, out, in)."""
    return g[:, :, None] * (torch.cat([a, torch.ones(len(a), 1)], 1) if biased else a)[:, None]


@pytest.mark.parametrize("bad", [None, "inputs", "cotangents", "too large"])
def test_what_they_tell_is_what_each_tells_by_itself(bad: str | None) -> None:
    """One that holds what is no number, or what has no square, changes nothing of the others."""
    (layers, vectors), given = frame(), factors()
    if bad is not None:
        given[1][bad == "cotangents"][2, 1] = 1e200 if bad == "too large" else torch.inf
    together = SideBySide(layers, columns_of(given)[None])
    goods = together.finite()[0]
    assert goods.tolist() == [True, bad is None, True]
    expected = [written_out(a, g, biased) for (a, g), biased in zip(given, BIASED, strict=True)]
    sums = [torch.ones(2 * width * out) for width, out in SHAPES]
    outs = [
        {"weight": own[: width * out]} | ({"bias": own[width * out : width * out + out]} if biased else {})
        for own, (width, out), biased in zip(sums, SHAPES, BIASED, strict=True)
    ]
    together.add_to(outs, beta=0.5, alpha=3.0)
    values, sizes = together.explained()
    for i, (r, s) in enumerate(vectors):
        if not goods[i]:
            assert all((total == 0.5).all() for total in outs[i].values())
            assert not values[i].isfinite()
            continue
        squares, width = expected[i].square().sum(0), SHAPES[i][0]
        torch.testing.assert_close(outs[i]["weight"].view_as(squares[:, :width]), 0.5 + 3 * squares[:, :width])
        if BIASED[i]:
            torch.testing.assert_close(outs[i]["bias"], 0.5 + 3 * squares[:, -1])
        whole = torch.cat([s, torch.ones(int(BIASED[i]))])
        torch.testing.assert_close(values[i], r @ expected[i].sum(0) @ whole)
        a, g = given[i]
        torch.testing.assert_close(sizes[i], g.square().sum() * (a.square().sum() + 6 * BIASED[i]))


def test_numbers_whose_squares_are_too_large_are_left_out_in_float32() -> None:
    """They are finite themselves, and nothing of them gets into the other layers."""
    (layers, _), given = frame(), [(a.float(), g.float()) for a, g in factors()]
    given[1][0][2, 1] = 1e25
    together = SideBySide(Frame(layers.widths, *[x.float() for x in layers[1:]]), columns_of(given)[None])
    assert together.finite()[0].tolist() == [True, False, True]
    assert together.explained()[0].isfinite().tolist() == [True, False, True]
