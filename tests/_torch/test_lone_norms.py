"""Batch and instance normalisation of one sample whose gradient comes from tokens."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import Diagonals, per_layer_fisher_diagonal, per_layer_hessian_diagonal
from secorder._torch.lone_norms import contiguous_gradients


class Tokens(nn.Module):
    """A stem of convolutions, of whose output each position is a token."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 2), norm, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(torch.tanh(tokens) * tokens).mean(1)
        return logits


def type_2(*args: object) -> Diagonals:
    return per_layer_fisher_diagonal(*args, fisher_type="type-2")  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", [per_layer_fisher_diagonal, type_2, per_layer_hessian_diagonal])
@pytest.mark.parametrize(
    "norm", [lambda: nn.BatchNorm2d(4).eval(), lambda: nn.InstanceNorm2d(4)], ids=["batch", "instance"]
)
def test_one_sample_has_the_curvature_of_two_alike(
    norm: Callable[[], nn.Module], measure: Callable[..., Diagonals]
) -> None:
    """Of two, PyTorch's own gradient is right."""
    model, x, y = Tokens(norm()), torch.randn(1, 1, 4, 4), torch.tensor([1])
    found = measure(model, nn.CrossEntropyLoss(), x, y)
    expected = measure(model, nn.CrossEntropyLoss(), x.repeat(2, 1, 1, 1), y.repeat(2))
    torch.testing.assert_close(found["conv"], expected["conv"], rtol=1e-9, atol=1e-12)


def test_outputs_stay_bit_for_bit_and_functions_are_put_back() -> None:
    model, x, functions = Tokens(nn.BatchNorm2d(4)), torch.randn(1, 1, 4, 4), (F.batch_norm, F.instance_norm)
    expected = model(x)
    with contiguous_gradients():
        assert torch.equal(model(x), expected)
    assert functions == (F.batch_norm, F.instance_norm)
