"""Roots of the loss's Hessian in the outputs: every form against the Hessian formed whole, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.vjp import gradients
from secorder.oneshot.output_root import output_root
from secorder.oneshot.root_forms import signed_factors
from secorder.oneshot.roots import Draws, Root, Single, from_hessian

from ..helpers import seeded

N, C, T = 4, 6, 3
LABELS = torch.arange(N) % C
TOKENS = torch.arange(N * T).view(N, T) % C
VALUES = torch.randn(N, C, generator=seeded(), dtype=torch.float64)
WEIGHTS = torch.arange(1.0, C + 1, dtype=torch.float64)
SCALES = 10.0 ** torch.arange(-4, 4, 2, dtype=torch.float64)  # of samples
SIGNS = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64)


@dataclass
class Case:
    """A loss of outputs of these shapes; what form its root is found to have."""

    loss: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...] = ((C,),)
    columns: int | None = None  # where they are fewer than the outputs
    closed: bool = True  # the diagonal is known without a product
    scale: float = 1.0  # of the outputs
    rounding: float = 0.0  # what autograd itself loses


def tokens(f: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(f.flatten(0, 1), TOKENS.flatten(), **options)


def gaussian(mean: Tensor, raw: Tensor) -> Tensor:
    return F.gaussian_nll_loss(mean, VALUES[:, : mean.shape[1]], F.softplus(raw), full=True)


def by_sample(f: Tensor, weights: Tensor) -> Tensor:
    return (weights * F.cross_entropy(f, LABELS, reduction="none")).sum()


CASES: dict[str, Case] = {
    "cross entropy": Case(lambda f: F.cross_entropy(f, LABELS), columns=C - 1),
    "class weights": Case(lambda f: F.cross_entropy(f, LABELS, weight=WEIGHTS)),
    "smoothed, weighted": Case(lambda f: F.cross_entropy(f, LABELS, weight=WEIGHTS, label_smoothing=0.2)),
    "probabilities": Case(lambda f: F.cross_entropy(f, VALUES.softmax(1))),
    "sure of itself": Case(lambda f: F.cross_entropy(f, LABELS), scale=30.0, rounding=1e-16),
    "weights over decades": Case(lambda f: by_sample(f, SCALES)),
    "negative advantages": Case(lambda f: by_sample(f, SIGNS)),
    "tokens": Case(tokens, ((T, C),)),
    "padding": Case(lambda f: tokens(f, ignore_index=2), ((T, C),)),
    "shifted tokens": Case(
        lambda f: F.cross_entropy(f[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()),
        ((T, C),),
        columns=(T - 1) * (C - 1),
    ),
    "pixels": Case(lambda f: F.cross_entropy(f, TOKENS.view(N, 1, T).expand(-1, 2, -1)), ((C, 2, T),)),
    "over all of them": Case(lambda f: F.cross_entropy(f.flatten(1), LABELS), ((T, C),)),
    "some classes": Case(lambda f: F.cross_entropy(f[:, :3], LABELS % 3), columns=2),
    "temperature": Case(lambda f: F.kl_div((f / 3).log_softmax(1), VALUES.softmax(1), reduction="batchmean")),
    "focal": Case(lambda f: by_sample(f, (1 - f.softmax(1)[range(N), LABELS]) ** 2)),
    "squared": Case(lambda f: F.mse_loss(f, VALUES.to(f))),
    "binary": Case(lambda f: F.binary_cross_entropy_with_logits(f, VALUES.sigmoid(), WEIGHTS, pos_weight=WEIGHTS)),
    "probability": Case(lambda f: F.binary_cross_entropy(f.sigmoid(), VALUES.sigmoid())),
    "huber": Case(lambda f: F.huber_loss(f, VALUES, delta=0.7)),
    "poisson": Case(lambda f: F.poisson_nll_loss(f, VALUES.exp(), full=True)),
    "concave": Case(lambda f: -torch.cosh(f - VALUES).sum()),
    "one number a sample": Case(lambda f: F.mse_loss(f, VALUES[:, 0]), ((),)),
    "mean and variance": Case(gaussian, ((C,), (C,))),
    "halves": Case(lambda f: gaussian(*f.chunk(2, 1))),
    "in turn": Case(lambda f: gaussian(f[:, ::2], f[:, 1::2])),
    "maps of both": Case(
        lambda f: gaussian(f[:, :C].flatten(1, 2)[:, :C], f[:, C:].flatten(1, 2)[:, :C]), ((2 * C, 1),)
    ),
    "one variance": Case(lambda m, raw: gaussian(m, raw.expand(-1, C)), ((C,), (1,))),
    "one is ignored": Case(
        lambda f, g: F.cross_entropy(f, LABELS) + 0 * g.detach().sum(), ((C,), (50,)), columns=C - 1
    ),
    "one is linear": Case(lambda f, g: F.mse_loss(f, VALUES) + g.sum(), ((C,), (50,)), columns=C),
    "two heads": Case(lambda f, g: F.cross_entropy(f, LABELS) + g.square().sum(), ((C,), (T, 2))),
    "of three, two": Case(
        lambda f, g, h: gaussian(f, h) + F.cross_entropy(g, LABELS), ((C,), (C,), (C,)), columns=3 * C - 1
    ),
    "products": Case(lambda f: torch.sin(f * VALUES * f.roll(1, 1)).sum()),
    "zero diagonal": Case(lambda f: (f[:, :3] * f[:, 3:]).sum()),
    "positions": Case(lambda f: torch.logsumexp(f, 2).square().sum(), ((T, C),)),
    "a sum of squares": Case(lambda f: f.sum(1).square().sum()),
    "absolute": Case(lambda f: (f - VALUES).abs().sum(), columns=1),
    "scales over decades": Case(lambda f: ((f[:, 0] * 1e3) ** 4 + torch.cosh(f[:, 1:] * 1e-6).sum(1)).sum()),
}


def measured(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Root, Tensor, list[Tensor]]:
    """The root that is found, and the Hessian of each sample formed whole."""
    generator = seeded()
    points = [
        (torch.randn(N, *shape, generator=generator, dtype=torch.float64) * case.scale).to(dtype).requires_grad_()
        for shape in case.shapes
    ]
    root = output_root(gradients(case.loss(*points), points, create_graph=True), points)
    exact = [x.detach().double().requires_grad_() for x in points]
    rows = torch.autograd.functional.hessian(case.loss, tuple(exact))
    whole = torch.cat(
        [
            torch.cat([h.reshape(x.numel(), y.numel()) for h, y in zip(r, exact, strict=True)], 1)
            for r, x in zip(rows, exact, strict=True)
        ]
    )
    sizes = [x.numel() // N for x in exact]
    index = torch.cat([torch.arange(x.numel()).view(N, -1) + sum(sizes[:i]) * N for i, x in enumerate(exact)], 1)
    return root, torch.stack([whole[i][:, i] for i in index]), points


def product(root: Root) -> Tensor:
    pairs = root.columns(range(root.num_columns))
    u = pairs.u if pairs.sign is None else pairs.u * pairs.sign[..., None]
    return torch.einsum("kni,knj->nij", u, pairs.u if pairs.v is None else pairs.v)


@pytest.mark.parametrize("name", CASES)
def test_roots_square_to_the_hessian(name: str) -> None:
    case = CASES[name]
    root, hessian, _ = measured(case)
    size = hessian.abs().amax((1, 2), keepdim=True)
    assert ((product(root) - hessian).abs() <= 1e-12 * size + case.rounding).all()
    assert root.num_columns == case.columns or (case.columns is None and root.num_columns <= hessian.shape[1])
    assert (root.diagonal is not None) == case.closed
    if root.diagonal is not None:
        assert root.blocks is not None
        apart = (root.blocks[:, None] != root.blocks) | (root.blocks < 0)
        assert not hessian[:, apart].any()
        assert ((root.diagonal - hessian.diagonal(dim1=1, dim2=2)).abs() <= 1e-12 * size[:, 0] + case.rounding).all()
    signs = torch.randint(0, 2, (2, N, root.num_columns), generator=seeded()).double() * 2 - 1
    mixed, columns = root.mixed(signs), root.columns(range(root.num_columns))
    torch.testing.assert_close(mixed.u, torch.einsum("mnk,knc->mnc", signs, columns.u))
    other = columns.u if columns.sign is None else columns.u * columns.sign[..., None]
    other = other if columns.v is None else columns.v
    found = mixed.u if mixed.v is None else mixed.v
    torch.testing.assert_close(found, torch.einsum("mnk,knc->mnc", signs, other))
    part = root.columns(range(root.num_columns // 2, root.num_columns))
    torch.testing.assert_close(part.u, columns.u[root.num_columns // 2 :])


@pytest.mark.parametrize("name", ["cross entropy", "padding", "pixels", "squared", "mean and variance", "two heads"])
def test_forms_are_found_in_single_precision(name: str) -> None:
    root, hessian, _ = measured(CASES[name], torch.float32)
    assert root.diagonal is not None
    assert ((product(root) - hessian).abs() <= 1e-5 * hessian.abs().amax((1, 2), keepdim=True)).all()


@pytest.mark.parametrize("margin", [0.0, 12.0, 16.0, 40.0])
def test_the_curvature_of_a_fitted_network_is_right_to_rounding_in_single_precision(margin: float) -> None:
    """Of probabilities next to one, the loss's own products are nothing but rounding."""
    f = torch.randn(N, C, generator=seeded(), dtype=torch.float32) + margin * F.one_hot(LABELS, C).float()
    point = f.requires_grad_()
    root = output_root(gradients(F.cross_entropy(point, LABELS), [point], create_graph=True), [point])
    p = f.detach().double().softmax(1)
    rest = (p[:, None] * (1 - torch.eye(C))).sum(2)  # 1 − p, without cancelling
    expected = torch.where(torch.eye(C) == 1, (p * rest)[:, None], -p[:, :, None] * p[:, None]) / N
    size = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert ((product(root) - expected).abs() <= 2e-5 * size[:, :, None] * size[:, None]).all()


@pytest.mark.parametrize("scale", [1.0, 20.0, 50.0, 300.0])
@pytest.mark.parametrize("ignored", [False, True])
def test_classes_that_are_sure_in_single_precision(scale: float, ignored: bool) -> None:
    """All of a sure class's row of the Hessian may round to zero: it is of the softmax nevertheless."""
    f = (scale * torch.randn(16, 300, generator=seeded(), dtype=torch.float64)).float()
    labels = f.argmax(1)
    labels[::2] = torch.arange(8)
    labels[3:9] = -100 if ignored else 0
    f.requires_grad_()
    root = output_root(gradients(F.cross_entropy(f, labels), [f], create_graph=True), [f])
    assert root.diagonal is not None
    assert root.right is None


def test_a_form_that_nearly_fits_is_not_taken() -> None:
    """A coupling of one in a million, of two positions or of two elements."""
    for loss, shape in (
        (lambda f: tokens(f) + 1e-6 * (f[0, 0, 0] * f[0, 2, 1]), (T, C)),
        (lambda f: F.mse_loss(f, VALUES) + 1e-6 * (f[1, 0] * f[1, 4]), (C,)),
    ):
        root, hessian, _ = measured(Case(loss, (shape,)))
        torch.testing.assert_close(product(root), hessian, rtol=0, atol=1e-12)


def test_what_is_too_large_goes_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secorder.oneshot.root_forms.MAX_BLOCK", 2)
    root, hessian, _ = measured(CASES["products"])
    assert root.diagonal is None
    torch.testing.assert_close(product(root), hessian)


@pytest.mark.parametrize("name", ["tokens", "negative advantages", "products", "zero diagonal"])
def test_draws_are_unbiased_whatever_is_made_at_a_time(name: str) -> None:
    root, hessian, _ = measured(CASES[name])
    draws = Draws.of(root, 4000, seeded())
    pairs = draws.columns(range(4000))
    found = torch.einsum("kni,knj->nij", pairs.u, pairs.u if pairs.v is None else pairs.v)
    assert (found - hessian).norm() < 0.15 * hessian.norm()
    torch.testing.assert_close(draws.columns(range(7, 9)).u, pairs.u[7:9], rtol=0, atol=0)


def test_signed_factors_of_a_matrix_that_its_diagonal_does_not_bound() -> None:
    assert signed_factors(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])) is None


def test_pairs_of_what_is_given() -> None:
    hessian = torch.randn(N, C, C, generator=seeded())
    torch.testing.assert_close(product(from_hessian(hessian)), hessian)
    u = torch.randn(N, C)
    assert torch.equal(Single(u).columns(range(1)).u[0], u)
