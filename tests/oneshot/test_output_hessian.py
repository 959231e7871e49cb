"""The loss as a function of the model's output, and whether samples are coupled in it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.vjp import gradients
from secorder.layers.layout import Layout
from secorder.oneshot.independence import block_diagonal, over_samples, sample_bits
from secorder.oneshot.output_hessian import loss_of_output, output_points

from ..helpers import seeded

N, C = 5, 4


CLASSES = torch.arange(N) % C


@pytest.mark.parametrize("pair", [(0, 1), (1, 4), (2, 3)])
def test_a_single_coupled_pair_is_seen(pair: tuple[int, int]) -> None:
    f = torch.randn(N, C, requires_grad=True)
    one, other = pair
    for coupling, alone in ((0.0, True), (1e-12, False)):
        loss = (f**4).sum() + coupling * (f[one] * f[other]).sum()
        assert block_diagonal(gradients(loss, [f], create_graph=True), [f], seeded()) is alone


def test_every_two_samples_differ_in_a_bit() -> None:
    bits = sample_bits(13)
    assert all(bool((bits[:, i] != bits[:, j]).any()) for i in range(13) for j in range(i))


@pytest.mark.parametrize("layout", [Layout(), Layout(1), Layout(0, 2, True), Layout(0, 2, False)])
def test_values_of_samples_are_spread_by_layout(layout: Layout) -> None:
    shape = {1: (3, N, 2)}.get(layout.dim, (N * layout.rows, 3))
    values = torch.arange(float(N))
    spread = over_samples(values[None], torch.zeros(shape), layout)[0]
    assert spread.shape == shape
    assert all(bool((part == value).all()) for part, value in zip(layout.split(spread), values, strict=True))
    assert torch.equal(layout.join(layout.split(spread)), spread)


def test_a_loss_that_does_not_go_by_the_output_alone() -> None:
    f = torch.randn(N, C, requires_grad=True)

    def dims(_: Tensor) -> int:
        return 0

    assert loss_of_output(F.cross_entropy, f, CLASSES, dims, F.cross_entropy(f, CLASSES)) is not None
    noisy = lambda f, t: F.cross_entropy(f, t) * torch.rand(())  # noqa: E731
    assert loss_of_output(noisy, f, CLASSES, dims, noisy(f, CLASSES)) is None
    inside = lambda f, t: (f.detach() ** 2).sum()  # noqa: E731
    assert loss_of_output(inside, f, CLASSES, dims, torch.zeros(())) is None


@pytest.mark.parametrize("unused", [False, True])
def test_a_loss_that_looks_for_more_than_its_argument_is_told_from_one_that_fails(unused: bool) -> None:
    f = torch.randn(N, C, requires_grad=True)

    def penalised(output: Tensor, t: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(F.cross_entropy(output, t), f, create_graph=True, allow_unused=unused)
        return F.cross_entropy(output, t) + g.square().sum()

    assert loss_of_output(penalised, f, CLASSES, lambda _: 0, penalised(f, CLASSES)) is None

    def failing(output: Tensor, t: Tensor) -> Tensor:
        raise (AttributeError if unused else RuntimeError)("of the user's own")

    with pytest.raises((AttributeError, RuntimeError), match="of the user's own"):
        loss_of_output(failing, f, CLASSES, lambda _: 0, F.cross_entropy(f, CLASSES))


def test_points_are_real_with_samples_in_dim_zero_and_on_the_graph() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    output = {"scores": (2 * x).t(), "waves": torch.complex(x, -x), "ids": torch.arange(3)}
    scores, waves = output_points(output, lambda t: 1 if t.shape == (4, 3) else 0)
    assert torch.equal(scores, 2 * x)
    assert torch.equal(waves, torch.stack([x, -x], -1))
    assert torch.autograd.grad(scores.sum() + waves.sum(), x)[0].eq(2).all()
    assert [p.shape for p in output_points(output, None)] == [(1, 12), (1, 24)]
