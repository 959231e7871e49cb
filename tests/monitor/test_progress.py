"""Progress is shown where it is asked for."""

import pytest
import torch.nn.functional as F
from torch import nn

from secorder import per_layer_fisher_diagonal, per_layer_hessian_diagonal

from ..helpers import data, mlp


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = mlp(), data()
    per_layer_hessian_diagonal(model, F.cross_entropy, *batch, progress=True, method="exact")
    assert "Hessian" in capsys.readouterr().out
    per_layer_hessian_diagonal(model, F.cross_entropy, *batch)
    assert capsys.readouterr().out == ""


def test_every_way_shows_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    batch = data()
    smooth, linear = mlp(), nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.ReLU(), nn.Linear(8, 3))
    per_layer_fisher_diagonal(smooth, F.cross_entropy, *batch, fisher_type="type-2", progress=True)
    assert "Fisher" in capsys.readouterr().out
    per_layer_hessian_diagonal(smooth, F.cross_entropy, *batch, progress=True, method="exact")
    assert "along the chain" in capsys.readouterr().out
    linear[0].register_forward_hook(lambda module, args, z: z.register_hook(lambda g: g) and None)  # no chain
    per_layer_hessian_diagonal(linear, F.cross_entropy, *batch, progress=True, method="exact")
    assert "Hessian by columns" in capsys.readouterr().out
