"""Squared norms of per-sample gradients by factors, against the gradients written out."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from secorder._torch import onednn
from secorder.layers import grams, norms, per_sample
from secorder.layers.norms import DenseNorms, squared_norm_of_sum, squared_norms
from secorder.layers.patches import Patches, whole_input
from secorder.layers.per_sample import Outer, PerSample, Rows, dense

from ..reference import assert_close


def check(parts_of: Sequence[Sequence[PerSample]], sizes: Sequence[int]) -> None:
    written = [
        torch.stack([dense(part, size) for part in parts]).sum(0) for parts, size in zip(parts_of, sizes, strict=True)
    ]
    rows = torch.cat(written, 1)
    assert_close(squared_norms(parts_of, sizes), rows.square().sum(1), 1e-12)
    assert_close(squared_norm_of_sum(parts_of, sizes), rows.sum(0).square().sum(), 1e-12)
    formed = DenseNorms()
    for start in (0, 2):
        formed.add([part[start : start + 2] if not start else part[start:] for part in written])
    each, total = formed.squares()
    assert_close(each, rows.square().sum(1), 1e-12)
    assert_close(total, rows.sum(0).square().sum(), 1e-12)


@pytest.mark.parametrize("groups", [1, 3])
def test_products_of_positions_and_gradients(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One position, few, many; weights alone, with their bias, used twice; a few samples at a time."""
    for elements in (1 << 20, 100):
        monkeypatch.setattr(per_sample, "CHUNK_ELEMENTS", elements)
        for positions, fan_in, width in itertools.product([1, 4, 40], [3, 30], [2, 20]):
            a, g = torch.randn(5, groups, positions, fan_in), torch.randn(5, groups, positions, width)
            sizes = [groups * fan_in * width, groups * width]
            check([[Outer(a, g)], [Outer(None, g)]], sizes)
            check([[Outer(a, g), Outer(a.flip(0), g + 1)], [Outer(None, g)]], sizes)


def test_gradients_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, of an input that is a tensor and of patches."""
    image = torch.randn(5, 3, 9, 9)
    patches = Patches(image, (3, 3), (1, 1), (1, 1), 1, (5, 1, 49, 27), (0, 0))
    for a in (torch.randn(5, 1, 49, 27), patches):
        g = torch.randn(5, 1, 49, 2)
        parts_of, sizes = [[Outer(a, g)], [Outer(None, g)]], [54, 2]
        expected = squared_norms(parts_of, sizes)
        single = replace(patches, image=image.float()) if isinstance(a, Patches) else a.float()
        with monkeypatch.context() as patch:
            patch.setattr(onednn, "ALONE", 1)
            found = squared_norms([[Outer(single, g.float())], [Outer(None, g.float())]], sizes)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_products_of_positions_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, of rows that lie side by side or apart, with a bias or without."""
    monkeypatch.setattr(onednn, "ALONE", 1)
    product = Mock(wraps=grams.product_by_onednn)
    monkeypatch.setattr(grams, "product_by_onednn", product)
    a, g = torch.randn(3, 1, 9, 300), torch.randn(3, 1, 9, 200)
    for parts_of, sizes in (([[Outer(a, g)], [Outer(None, g)]], [60000, 200]), ([[Outer(a, g)]], [60000])):
        expected = squared_norms(parts_of, sizes)
        for step in (1, 2):  # of twice as many every second one
            product.reset_mock()
            left, right = (x.float().repeat_interleave(step, 2)[:, :, ::step] for x in (a, g))
            found = squared_norms([[Outer(left, right)], [Outer(None, right)]][: len(sizes)], sizes)
            assert product.call_count == 2 * len(a)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("positions", [8, 12, 15])
@pytest.mark.parametrize("groups", [1, 2])
def test_pairs_across_halves_are_compared_once(positions: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision by oneDNN, as often as rows can be halved, where they lie side by side."""
    halves_from = 2  # rows: of fewer, products are not for oneDNN
    monkeypatch.setattr(grams, "multiplied_by_onednn", lambda like, n: like.dtype is torch.float32 and n >= halves_from)
    products = Mock(wraps=grams.row_grams)
    monkeypatch.setattr(norms, "row_grams", products)
    a, g = torch.randn(3, groups, positions, 300), torch.randn(3, groups, positions, 200)
    halvings = {8: 3, 12: 2, 15: 0}[positions]  # down to 1, 3, and 15
    for parts, sizes in (([a, g], [60000, 200]), ([a, g], [60000])):
        sizes = [groups * size for size in sizes]
        expected = squared_norms([[Outer(a, g)], [Outer(None, g)]][: len(sizes)], sizes)
        for together in (True, False):
            left, right = (x.float() if together else _apart(x.float()) for x in parts)
            products.reset_mock()
            found = squared_norms([[Outer(left, right)], [Outer(None, right)]][: len(sizes)], sizes)
            side_by_side = together or groups > 1  # groups are copied
            assert products.call_count == 2 * (1 + halvings * side_by_side)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def _apart(x: Tensor) -> Tensor:
    """The same numbers in a memory that has the positions first."""
    return x.transpose(0, 2).contiguous().transpose(0, 2)


def test_rows_that_are_looked_up_more_than_once() -> None:
    for positions in (1, 5, 200):
        rows = Rows(torch.randint(7, (5, positions)), torch.randn(5, positions, 3), 7)
        check([[rows]], [21])
        head = Outer(torch.randn(5, 1, 4, 3), torch.randn(5, 1, 4, 7))
        check([[rows, head], [Outer(None, head.g)]], [21, 7])
        check([[rows, torch.randn(5, 7, 3)]], [21])


def test_the_cheaper_form_is_taken_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def of(name: str) -> object:
        def form(a: Tensor, g: Tensor, rows: slice, with_bias: bool) -> Tensor:
            taken.append(name)
            return torch.zeros(len(g[rows]))

        return form

    for name in ("_by_products", "_by_gradients"):
        monkeypatch.setattr(norms, name, of(name))
    for positions, width in ((64, 256), (256, 64)):
        a = torch.randn(2, 1, positions, width)
        squared_norms([[Outer(a, a)]], [width * width])
    assert taken == ["_by_products", "_by_gradients"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positions", [1, 4, 40])
def test_of_factors_that_come_in_bfloat16_nothing_is_rounded_but_sums(positions: int, groups: int) -> None:
    a, g = (torch.randn(5, groups, positions, k).bfloat16().float() for k in (30, 20))
    image = torch.randn(5, 2 * groups, 7, 7).bfloat16().float()
    images = Patches(image, (3, 3), (1, 1), (1, 1), groups, (5, groups, 25, 18), (0, 0))
    of_images = Outer(images, torch.randn(5, groups, 25, 4).bfloat16().float())
    for weight in (Outer(a, g), Outer(a[..., :3], g), of_images):
        parts_of: list[list[PerSample]] = [[weight], [Outer(None, weight.g)]]
        assert isinstance(weight.a, Tensor | Patches)
        sizes = [groups * weight.a.shape[3] * weight.g.shape[3], groups * weight.g.shape[3]]
        exact = squared_norms([[Outer(whole_input(weight.a).double(), weight.g.double())], parts_of[1]], sizes)
        found = squared_norms(parts_of, sizes, low=True)
        assert found.dtype is torch.float32
        assert_close(found.double(), exact.double(), 1e-5)
    rounded, kept = (squared_norms([[Outer(a + 0.01, g)]], [groups * 600], low=low) for low in (True, False))
    assert torch.equal(rounded, kept) == (positions == 1)
