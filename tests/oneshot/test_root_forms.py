"""The forms of a loss's Hessian: a guess stands where it is right, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.memory import most_bytes
from secorder._torch.vjp import CHUNK_BYTES
from secorder.oneshot.known_losses import softmax_scale
from secorder.oneshot.root_forms import Product, _cholesky_factor, cross_entropy_root, form_root, signed_factors
from secorder.oneshot.roots import Root

N = 4


def hessian_of(loss: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """(N, C, C), formed whole; of a loss whose samples do not interact."""
    size = f[0].numel()
    full = torch.func.hessian(lambda v: loss(v.view_as(f)))(f.flatten())
    return full.view(N, size, N, size)[range(N), :, range(N)]


def root_of(loss: Callable[[Tensor], Tensor], f: Tensor) -> tuple[Root, Tensor, Tensor]:
    """The root, what it is the root of, and what it should be."""
    h = hessian_of(loss, f)
    root = form_root(lambda v: torch.einsum("mni,nij->mnj", v, h), f, 1)
    return root, matrix_of(root), h


def matrix_of(root: Root) -> Tensor:
    """What it is the root of."""
    pairs = root.columns(range(root.num_columns))
    v = pairs.u if pairs.v is None else pairs.v
    sign = torch.ones_like(pairs.u[..., 0]) if pairs.sign is None else pairs.sign
    return torch.einsum("kni,knj,kn->nij", pairs.u, v, sign)


def nearly(f: Tensor) -> Tensor:
    """Cross entropy, and a little that is not."""
    return F.cross_entropy(f, torch.arange(N) % 3, reduction="sum") + 1e-4 * (f[:, 0] * f[:, 2]).sin().sum()


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], int | None]] = {
    "softmax": (lambda f: F.cross_entropy(f, torch.arange(N) % 3), (3,), 3),
    "softmax by position": (lambda f: F.cross_entropy(f, torch.zeros(N, 2, dtype=torch.long)), (3, 2), 2),
    "elementwise": (lambda f: f.sin().sum(), (5,), 5),
    "pairs": (lambda f: (f[:, :2].square() * f[:, 2:].exp()).sum(), (4,), 2),
    "none": (lambda f: f.sum(1).sin().sum() + f.square().square().sum(), (3,), 1),
    "almost": (nearly, (3,), 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_form_is_right_and_tells_what_does_not_interact(name: str) -> None:
    loss, shape, blocks = LOSSES[name]
    root, found, expected = root_of(loss, torch.randn(N, *shape))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12 * expected.abs().max())
    if root.diagonal is not None and root.blocks is not None:
        assert torch.allclose(root.diagonal, expected.diagonal(dim1=1, dim2=2), atol=1e-12)
        assert len(root.blocks.unique()) == blocks or name == "softmax"
    apart = expected.new_ones(()) if root.blocks is None else root.blocks[:, None] != root.blocks
    if root.blocks is not None:
        assert not expected[:, apart].any()


def test_signed_factors_are_roots_of_any_symmetric_matrix_that_its_diagonal_bounds() -> None:
    u = torch.randn(6, 4, 4)
    scales = 10.0 ** torch.arange(-6, 6, 3)
    positive = (u @ u.mT) * scales[:, None] * scales
    for h in (positive, -positive, torch.diag_embed(torch.randn(6, 4)), positive[:, :1, :1]):
        found = signed_factors(h)
        assert found is not None
        columns, sign = found
        again = torch.einsum("qik,qjk,qk->qij", columns, columns, sign)
        assert ((again - h).abs() <= 1e-9 * (h.diagonal(dim1=1, dim2=2).abs().sqrt()[:, :, None] ** 2 + h.abs())).all()
    assert signed_factors(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])) is None


def test_matrices_are_factored_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.randn(7, 3, 2)
    whole = signed_factors(u @ u.mT)
    monkeypatch.setattr("secorder.oneshot.root_forms.default_chunk_size", lambda *_: 2)
    few = signed_factors(u @ u.mT)
    assert whole is not None
    assert few is not None
    assert all(torch.equal(one, other) for one, other in zip(whole, few, strict=True))
    assert whole[0].shape == (7, 3, 2)  # of rank two


def product_of(loss: Callable[[Tensor], Tensor], f: Tensor) -> Product:
    """With the Hessian of a loss, by autograd."""
    f = f.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(f), f, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        return torch.stack([torch.autograd.grad(gradient, f, v.view_as(f), retain_graph=True)[0] for v in vectors])

    return lambda vectors: product(vectors).flatten(2)


def test_elements_that_do_not_interact_are_told_however_much_rounding_is_in_a_product() -> None:
    """Far from zero, the second derivative of log cosh is what two numbers near one leave."""
    f = 8 * torch.randn(N, 6, dtype=torch.float32)
    root = form_root(product_of(lambda f: f.cosh().log().sum(), f), f, 1)
    assert root.right is None
    assert root.blocks is not None
    assert len(root.blocks.unique()) == 6
    assert torch.allclose(matrix_of(root), torch.diag_embed(f.double().cosh() ** -2).float(), atol=1e-6)
    f[:, 1] = 0.3

    def reaching(f: Tensor) -> Tensor:
        return f.cosh().log().sum() + 1e-3 * (f[:, 1] * f[:, 4]).sum()

    root, expected = form_root(product_of(reaching, f), f, 1), hessian_of(reaching, f)
    assert torch.allclose(matrix_of(root), expected, atol=1e-5)
    assert expected[:, 1, 4].any()


def test_blocks_take_a_few_copies_of_the_outputs() -> None:
    """Beside what is computed at a time: of a mean and a variance for each element, say."""
    f = torch.randn(64, 2, 8000)

    def loss(f: Tensor) -> Tensor:
        return (f[:, 0].square() * f[:, 1].exp()).sum()

    product, size = product_of(loss, f), f.numel() * f.element_size()
    assert form_root(product, f, 1).blocks is not None
    assert most_bytes(lambda: form_root(product, f, 1)) < 8 * size + CHUNK_BYTES["cpu"]


@pytest.mark.parametrize("scale", [1.0, 8.0, 60.0])
def test_the_root_of_a_softmax_has_a_column_fewer_and_is_right_to_rounding_in_every_class(scale: float) -> None:
    """Also where a class is sure, and where others underflow, in single precision."""
    p = (torch.randn(64, 1, 5, 1) * scale).float().softmax(2)
    left, weights = _cholesky_factor(p, p.new_ones(64, 1, 1, 1))
    u = left(torch.eye(4, dtype=torch.float32)[:, None]).double()
    found, q = torch.einsum("kni,knj->nij", u, u), p.flatten(1).double()
    rest = (q[:, None] * (1 - torch.eye(5))).sum(2)  # 1 − p, without cancelling
    expected = torch.where(torch.eye(5) == 1, (q * rest)[:, None], -q[:, :, None] * q[:, None])
    size = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert ((found - expected).abs() <= 2e-6 * size[:, :, None] * size[:, None] + 1e-42).all()
    torch.testing.assert_close(weights().double(), u.square().sum(2).T, rtol=1e-5, atol=1e-18)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (70, 2, 2)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_root_of_cross_entropy_by_definition(reduction: str, shape: tuple[int, ...], smoothing: float) -> None:
    """Also where a class is sure, or masked."""
    f, labels = 3 * torch.randn(N, *shape), torch.zeros(N, *shape[1:], dtype=torch.long)
    f[0, 0], f[1, 1] = 50.0, -1000.0
    loss_fn = torch.nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)
    scale = softmax_scale(loss_fn, f, labels)
    assert scale is not None
    mean = N if reduction == "mean" else 1  # of the batch's loss, which is that of samples times one over it
    expected = hessian_of(lambda g: mean * loss_fn(g, labels), f)
    if not smoothing:
        f[1, 1] = -torch.inf
    assert torch.allclose(matrix_of(cross_entropy_root(f, scale)), expected, rtol=1e-10, atol=1e-12)


def test_other_losses_have_no_root_by_definition() -> None:
    f, labels = torch.randn(N, 4), torch.zeros(N, dtype=torch.long)
    assert softmax_scale(F.nll_loss, f, labels) is None
    assert softmax_scale(F.cross_entropy, f, f.softmax(1)) is None
    assert softmax_scale(F.cross_entropy, f[:, :1], labels) is None
