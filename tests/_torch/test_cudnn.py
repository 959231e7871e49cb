"""Recurrent layers by operations that can be differentiated twice, on devices where their own cannot."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secorder import CurvatureProbe
from secorder._torch.cudnn import _WithoutCudnn, differentiable_recurrence

from ..reference import assert_all_close, hessian_by_element


class Seen(TorchFunctionMode):
    """Under which setting each function is called."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled: dict[str, bool] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.enabled[func.__name__] = torch.backends.cudnn.enabled
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_alone(kind: type[nn.RNNBase]) -> None:
    with Seen() as seen, _WithoutCudnn():
        nn.Linear(3, 3)(kind(2, 3)(torch.randn(4, 5, 2))[0])
    assert seen.enabled.pop("linear")
    assert [enabled for name, enabled in seen.enabled.items() if name in {"lstm", "gru", "rnn_tanh"}] == [False]
    assert torch.backends.cudnn.enabled


def test_nothing_to_do_on_a_cpu() -> None:
    assert not isinstance(differentiable_recurrence(nn.LSTM(2, 3)), TorchFunctionMode)


class Last(nn.Module):
    """A head on the last step of a recurrent layer."""

    def __init__(self, core: nn.RNNBase) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(x)[0][:, -1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN is of CUDA devices")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_curvature_in_both_modes(kind: type[nn.RNNBase], training: bool) -> None:
    model, loss_fn = Last(kind(2, 3, batch_first=True)).cuda().train(training), nn.CrossEntropyLoss()
    batch = torch.randn(4, 5, 2, device="cuda"), torch.randint(3, (4,), device="cuda")
    found = CurvatureProbe(model, layer_types="all").hessian_diagonal(loss_fn, *batch, method="exact").by_parameter()
    with torch.backends.cudnn.flags(enabled=False):
        assert_all_close(found, hessian_by_element(model, loss_fn, *batch))
    assert CurvatureProbe(model, layer_types="all").fisher_diagonal(loss_fn, *batch)
