"""Progress is shown where it is asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import per_layer_hessian_diagonal

N = 6


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, progress=True)
    assert "Hessian" in capsys.readouterr().out
    per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets)
    assert capsys.readouterr().out == ""
