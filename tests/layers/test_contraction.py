"""The contraction against per-sample gradients that are written out, multiplied and summed."""

from dataclasses import replace

import pytest
import torch

from secorder._torch import onednn
from secorder._torch.onednn import multiplied_by_onednn
from secorder.layers import contraction, per_sample
from secorder.layers.contraction import contract, contract_sum
from secorder.layers.patches import Patches
from secorder.layers.per_sample import Outer, PerSample, Rows, with_cotangents

from .forms import NAMES, SIZE, form, written_out


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_a_per_sample_gradient(name: str) -> None:
    u = form(name)
    v = with_cotangents(u, lambda g: g.roll(1, -1) * 2)
    squares, products = (written_out(u) ** 2).sum(0), (written_out(u) * written_out(v)).sum(0)
    torch.testing.assert_close(contract(u, numel=SIZE), squares)
    torch.testing.assert_close(contract(u, v, numel=SIZE), products)
    torch.testing.assert_close(contract(u, v, numel=SIZE, alpha=3.0), 3 * products)
    out = torch.ones(SIZE)
    assert contract(u, v, numel=SIZE, out=out, beta=0.5, alpha=3.0) is out
    torch.testing.assert_close(out, 0.5 + 3 * products)
    contract(u, numel=SIZE, out=out.fill_(torch.nan), beta=0.0)
    torch.testing.assert_close(out, squares)
    stacked = with_cotangents(u, lambda g: torch.stack([g, g.roll(1, -1) * 2]))
    torch.testing.assert_close(contract(stacked, numel=SIZE), squares + (written_out(v) ** 2).sum(0))


@pytest.mark.parametrize("name", NAMES)
def test_no_samples(name: str) -> None:
    u = form(name)
    if isinstance(u, Outer):
        empty: PerSample = Outer(None if u.a is None else u.a[:0], u.g[:0])
    else:
        empty = Rows(u.ids[:0], u.g[:0], u.rows) if isinstance(u, Rows) else u[:0]
    torch.testing.assert_close(contract(empty, numel=SIZE), torch.zeros(SIZE))
    torch.testing.assert_close(contract(empty, numel=SIZE, out=torch.ones(SIZE), beta=0.5), torch.full((SIZE,), 0.5))


@pytest.mark.parametrize("name", ["positions", "groups", "bias"])
def test_a_few_elements_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a large parameter takes: pieces of rows, added in place."""
    monkeypatch.setattr(per_sample, "CHUNK_ELEMENTS", 4)
    monkeypatch.setattr(contraction, "IN_PLACE_ELEMENTS", 1)
    u = form(name)
    v = with_cotangents(u, lambda g: g.roll(1, -1) * 2)
    out = torch.ones(SIZE)
    contract(u, v, numel=SIZE, out=out, beta=0.5, alpha=3.0)
    torch.testing.assert_close(out, 0.5 + 3 * (written_out(u) * written_out(v)).sum(0))
    torch.testing.assert_close(contract(u, numel=SIZE), (written_out(u) ** 2).sum(0))


@pytest.mark.parametrize("name", ["positions", "groups"])
def test_one_sample_after_the_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is larger than a cache wants, a few rows of one sample at a time; also where that is differentiated."""
    monkeypatch.setattr(contraction, "ALONE_ELEMENTS", 1)
    monkeypatch.setattr(contraction, "CACHED_ELEMENTS", 4)
    u = form(name)
    v = with_cotangents(u, lambda g: g.roll(1, -1) * 2)
    expected = (written_out(u) * written_out(v)).sum(0)
    torch.testing.assert_close(contract(u, v, numel=SIZE), expected)
    torch.testing.assert_close(contract(u, numel=SIZE), (written_out(u) ** 2).sum(0))
    differentiable = with_cotangents(u, lambda g: g.clone().requires_grad_())
    found = contract(differentiable, v, numel=SIZE)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad


@pytest.mark.parametrize("name", ["positions", "groups"])
def test_samples_that_are_added_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass over what was formed of several; also where that is differentiated, and where it may not count."""
    monkeypatch.setattr(contraction, "APART_ELEMENTS", 1)
    u = form(name)
    v = with_cotangents(u, lambda g: g.roll(1, -1) * 2)
    expected, squares = ((written_out(u) * written_out(other)).sum(0) for other in (v, u))
    for keep in (None, torch.tensor(True)):
        out = torch.ones(SIZE)
        contract(u, v, numel=SIZE, out=out, beta=0.5, alpha=3.0, keep=keep)
        torch.testing.assert_close(out, 0.5 + 3 * expected)
        torch.testing.assert_close(contract(u, numel=SIZE, out=out, beta=0.0, alpha=2.0, keep=keep), 2 * squares)
    factor = u.g.clone().requires_grad_()
    (found,) = torch.autograd.grad(contract(u._replace(g=factor), numel=SIZE).sum(), factor)
    again = u.g.clone().requires_grad_()
    (of_written,) = torch.autograd.grad((written_out(u._replace(g=again)) ** 2).sum(), again)
    torch.testing.assert_close(found, of_written)


@pytest.mark.parametrize("cached", [1, 2 * 2 * 9 * 18, 1 << 18])
def test_patches_of_some_samples_at_a_time(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one, of two, of all."""
    monkeypatch.setattr(contraction, "ALONE_ELEMENTS", 1)
    monkeypatch.setattr(contraction, "CHUNK_ELEMENTS", cached)
    a = Patches(torch.randn(5, 4, 6, 6), (3, 3), (2, 2), (1, 1), 2, (5, 2, 9, 18), (1, 1))
    u, v = (Outer(a, torch.randn(5, 2, 9, 3)) for _ in range(2))
    each = [torch.matmul(part.g.transpose(2, 3), a[:]).flatten(1) for part in (u, v)]
    size = 2 * 3 * 18
    torch.testing.assert_close(contract(u, v, numel=size), (each[0] * each[1]).sum(0))
    torch.testing.assert_close(contract(u, numel=size), (each[0] ** 2).sum(0))


@pytest.mark.parametrize("pieces", [4, 1 << 20])
@pytest.mark.parametrize("name", ["one_position", "positions", "groups"])
def test_products_by_onednn(name: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large and in single precision, in pieces of one row and as a whole; also where it is differentiated."""
    u = form(name)
    v = with_cotangents(u, lambda g: g.roll(1, -1) * 2)
    expected, squares = ((written_out(u) * written_out(other)).sum(0) for other in (v, u))
    u, v = (Outer(u.a.float(), other.g.float()) for other in (u, v))
    monkeypatch.setattr(onednn, "ALONE", 1)
    monkeypatch.setattr(contraction, "ONEDNN_ELEMENTS", pieces)
    for start in (1.0, torch.nan):  # which is forgotten
        out, beta = torch.full((SIZE,), start, dtype=torch.float32), 0.5 if start == 1.0 else 0.0
        contract(u, v, numel=SIZE, out=out, beta=beta, alpha=3.0)
        torch.testing.assert_close(out.double(), beta + 3 * expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(contract(u, numel=SIZE).double(), squares, rtol=1e-5, atol=1e-5)
    differentiable = with_cotangents(u, lambda g: g.clone().requires_grad_())
    out = torch.zeros(SIZE, dtype=torch.float32)
    assert contract(differentiable, numel=SIZE, out=out).requires_grad


def has_onednn() -> bool:
    return multiplied_by_onednn(torch.zeros(1, dtype=torch.float32), onednn.ALONE)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 16])
def test_tall_products_by_onednn(samples: int, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cotangents that are more than the inputs and the sum together, they are made as their transposes."""
    monkeypatch.setattr(onednn, "ALONE", 1)
    turned = []
    add = contraction._add_turned
    monkeypatch.setattr(contraction, "_add_turned", lambda *args: turned.append(1) or add(*args))
    a, g, other = torch.randn(samples, 1, 5, 3), torch.randn(samples, 1, 5, 7), torch.randn(samples, 1, 5, 7)
    u, v = Outer(a, g), Outer(a, g if same else other)
    expected = (written_out(u) * written_out(v)).sum(0)
    u, v = (Outer(a.float(), own.g.float()) for own in (u, v))
    out = torch.ones(21, dtype=torch.float32)
    contract(u, None if same else v, numel=21, out=out, alpha=3.0)
    torch.testing.assert_close(out.double(), 1 + 3 * expected, rtol=1e-5, atol=1e-5)
    many = samples > 1 and has_onednn()
    assert len(turned) == many
    apart = torch.nn.functional.pad(u.g, (0, 1))[..., :-1]  # whose rows are apart
    steps_first = u.g.transpose(0, 2).contiguous().transpose(0, 2)
    for most, times in ((1 << 16, 5), (0, 7)):  # where a copy is small, they are put together for it
        monkeypatch.setattr(contraction, "COPIED_ELEMENTS", most)
        for g in (apart, steps_first):
            torch.testing.assert_close(contract(u._replace(g=g), numel=21), contract(u, numel=21), rtol=1e-5, atol=1e-5)
        assert len(turned) == many * times


def test_patches_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "ALONE", 1)
    monkeypatch.setattr(contraction, "CACHED_ELEMENTS", 2 * 9 * 36)  # patches of two samples
    image = torch.randn(5, 4, 6, 6)
    a = Patches(image, (3, 3), (2, 2), (1, 1), 1, (5, 1, 9, 36), (1, 1))
    u, v = (Outer(a, torch.randn(5, 1, 9, 3)) for _ in range(2))
    expected = contract(u, v, numel=3 * 36)
    u, v = (Outer(replace(a, image=image.float()), own.g.float()) for own in (u, v))
    torch.testing.assert_close(contract(u, v, numel=3 * 36).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [["positions", "rows"], ["rows", "positions", "rows"], ["positions", "one_position"], ["rows", "dense"],
     ["dense", "dense"], ["rows", "rows"], ["positions", "dense", "rows"], ["bias", "rows"], ["groups"]],
)  # fmt: skip
def test_sums_of_what_several_layers_bring(names: list[str]) -> None:
    forms = [form(name) for name in names]
    expected = (sum(written_out(part) for part in forms) ** 2).sum(0)
    torch.testing.assert_close(contract_sum(forms, numel=SIZE), expected)
    out = torch.ones(SIZE)
    contract_sum(forms, numel=SIZE, out=out, beta=0.5, alpha=3.0)
    torch.testing.assert_close(out, 0.5 + 3 * expected)
