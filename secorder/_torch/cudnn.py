"""Recurrent layers without cuDNN, which has no second derivative, no vmap, and no backward in evaluation mode."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .surroundings import assigned

_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


def differentiable_recurrence(model: nn.Module) -> AbstractContextManager[Any]:
    """Forwards of a model's recurrent layers by operations that can be differentiated twice, on any device."""
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    on_cuda = any(p.is_cuda for m in recurrent for p in m.parameters())
    return _WithoutCudnn() if on_cuda else nullcontext()


class _WithoutCudnn(TorchFunctionMode):
    """Runs recurrent layers alone without cuDNN: convolutions beside them are many times as fast with it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with assigned([torch.backends.cudnn], enabled=False) if func in _RECURRENT else nullcontext():
            return func(*args, **(kwargs or {}))
