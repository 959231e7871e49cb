"""Normalisations that can be differentiated at will."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secorder._torch.composite_norms import NORMS, Composite

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm([3, 2]),
    "layer without bias": lambda: nn.LayerNorm(2, bias=False),
    "batch": lambda: nn.BatchNorm1d(3),
    "batch without statistics": lambda: nn.BatchNorm1d(3, affine=False, track_running_stats=False),
    "batch in eval": lambda: nn.BatchNorm1d(3).eval(),
    "instance": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    "instance in eval": lambda: nn.InstanceNorm1d(3, track_running_stats=True).eval(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_statistics_are_those_of_pytorch(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(4, 3, 2)
    for p in layer.parameters():
        nn.init.uniform_(p)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    expected = layer(x)
    after = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    with Composite(NORMS):
        torch.testing.assert_close(layer(x), expected)
        half = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    layer.to(x.dtype)
    layer.load_state_dict(state)
    with Composite(NORMS):
        layer(x)
    torch.testing.assert_close(layer.state_dict(), after)


@pytest.mark.parametrize("name", LAYERS)
def test_third_derivatives_are_exact(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(4, 3, 2, requires_grad=True)
    v = torch.randn(4, 3, 2)

    def second(x: Tensor) -> Tensor:
        with Composite(NORMS):
            (g,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad((g * v).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, x)
