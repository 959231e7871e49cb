"""Progress is shown where it is asked for."""

import pytest
import torch.nn.functional as F

from secorder import per_layer_hessian_diagonal

from ..helpers import data, mlp


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = mlp(), data()
    per_layer_hessian_diagonal(model, F.cross_entropy, *batch, progress=True)
    assert "Hessian" in capsys.readouterr().out
    per_layer_hessian_diagonal(model, F.cross_entropy, *batch)
    assert capsys.readouterr().out == ""
