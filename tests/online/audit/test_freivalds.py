"""The audit: what captured calls explain of a whole gradient is that gradient, or it is seen that it is not."""

import pytest
import torch
from torch import Tensor, nn

from secorder.layers.per_sample import Outer, PerSample, Rows, dense
from secorder.layers.rules.convolution import convolution as rule
from secorder.online.audit.directions import Directions
from secorder.online.audit.freivalds import actual, explained
from secorder.online.audit.rounding import UNITS


def forms() -> dict[str, tuple[PerSample, tuple[int, ...]]]:
    return {
        "outer": (Outer(torch.randn(5, 1, 3, 4), torch.randn(5, 1, 3, 6)), (6, 4)),
        "groups": (Outer(torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3, 3)), (6, 4)),
        "bias": (Outer(None, torch.randn(5, 1, 3, 6)), (6,)),
        "rows": (Rows(torch.randint(6, (5, 3)), torch.randn(5, 3, 4), 6), (6, 4)),
        "dense": (torch.randn(5, 6, 4), (6, 4)),
    }


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("form", forms())
def test_what_explains_a_gradient(form: str, block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if block:
        monkeypatch.setattr("secorder.online.audit.directions.WHOLE_ELEMENTS", 0)
        monkeypatch.setattr("secorder.online.audit.directions.BLOCK", 2)
    part, shape = forms()[form]
    whole: Tensor = dense(part, torch.Size(shape).numel()).sum(0).view(shape)
    for _ in range(5):
        vectors = Directions().vectors(torch.zeros(shape))
        value, square = explained(part, vectors)
        bound = UNITS * torch.finfo(torch.float64).eps * square.sqrt()
        assert (actual(whole, vectors) - value).abs() <= bound
        other = whole + 1e-3 * torch.randn(shape)
        assert (actual(other, vectors) - value).abs() > bound


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv1d(3, 40, 5, stride=3), (4, 3, 40)),
        (nn.Conv2d(12, 8, 3, stride=2, padding=1, dilation=2, groups=2), (5, 12, 11, 13)),
        (nn.Conv3d(2, 4, (1, 2, 3), dilation=(1, 2, 1)), (3, 2, 5, 6, 7)),
    ],
)
def test_what_explains_the_gradient_of_a_convolution(convolution: nn.Conv2d, shape: tuple[int, ...]) -> None:
    """Looked at by a few channels, at one place of the kernel each time: in the end, at all of them."""
    convolution, images = convolution.to(torch.float64), torch.randn(shape, dtype=torch.float64)
    output = convolution(images)
    g = torch.randn_like(output)
    (whole,) = torch.autograd.grad(output, [convolution.weight], g)
    part = rule(convolution, (images,), g)["weight"]
    looked_at = torch.zeros(convolution.weight[0].numel(), dtype=torch.bool)
    for _ in range(200):
        vectors = Directions().vectors(convolution.weight)
        value, square = explained(part, vectors)
        assert (actual(whole, vectors) - value).abs() <= UNITS * torch.finfo(torch.float64).eps * square.sqrt()
        looked_at |= vectors.s != 0
    assert looked_at.all()


def test_samples_that_are_alike_round_as_their_sum_does() -> None:
    """A norm's scale, or a bias behind an average over positions: all samples push the same way."""
    gradient = torch.randn(1, 6).expand(50, 6)
    _, square = explained(gradient, Directions().vectors(gradient[0]))
    assert square.sqrt() >= gradient.sum(0).norm() * (1 - 1e-12)


def test_rows_that_are_nearly_alike_round_as_much_where_they_are_orthogonal_to_what_is_drawn() -> None:
    """As in a deep transformer, whose tokens grow alike: then one unlucky number would make the bound too small."""
    torch.manual_seed(0)
    a = torch.randn(96, dtype=torch.float32) + 1e-3 * torch.randn(8, 1, 64, 96, dtype=torch.float32)
    g = torch.randn(48, dtype=torch.float32) * torch.randn(8, 1, 64, 1, dtype=torch.float32)
    weight, bias = Outer(a, g), Outer(None, g)
    directions = Directions()
    for _ in range(2000):
        vectors = directions._drawn(torch.zeros(48, 96, dtype=torch.float32), rows=48, block=48)
        assert explained(weight, vectors)[1].sqrt() > 0.05 * a.norm() * g.norm()
        assert explained(weight, vectors, with_bias=True)[1].sqrt() > 0.05 * a.norm() * g.norm()
        assert explained(bias, vectors)[1].sqrt() > 0.05 * g.norm() * 512**0.5
