"""One-shot diagnostics: of a batch, and of a whole data set."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secorder import InvalidArgumentError, InvalidTypeError, SecorderError, diagnose

from ..helpers import data, make
from ..reference import assert_all_close, fisher_by_sample, hessian_by_element


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("told", [True, False])
def test_a_loader_gives_the_curvature_of_the_whole_data_set(reduction: Any, told: bool) -> None:
    model, batch = make(), data(10)
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    loader = DataLoader(TensorDataset(*batch), batch_size=4)  # 4, 4 and 2 samples
    found = diagnose(model, loss_fn, loader, reduction=reduction if told else None)
    assert found.fisher is not None
    assert_all_close(found.fisher.by_parameter(), fisher_by_sample(model, loss_fn, *batch, 10))
    assert_all_close(found.hessian.by_parameter(), hessian_by_element(model, loss_fn, *batch))
    assert found.num_samples == 10
    assert found.loss == pytest.approx(loss_fn(model(batch[0]), batch[1]).item())


def test_a_batch() -> None:
    model, batch = make(), data(10)
    found = diagnose(model, F.cross_entropy, *batch)
    assert found.fisher is not None
    assert_all_close(found.fisher.by_parameter(), fisher_by_sample(model, F.cross_entropy, *batch, 10))
    assert found.statistics["hessian"]["2"]["mean"] == pytest.approx(found.hessian["2"].mean().item())
    assert json.loads(found.to_json())["num_samples"] == 10
    assert "<table" in found._repr_html_()
    assert "tr F" in str(found)


def test_a_reduction_that_cannot_be_told() -> None:
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]))
    batch = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 0, 1, 2, 2])
    loader = DataLoader(TensorDataset(*batch), batch_size=4)
    with pytest.raises(InvalidArgumentError, match='reduction="mean" or "sum"'):
        diagnose(make(), loss_fn, loader)


def test_data_that_is_none() -> None:
    with pytest.raises(InvalidArgumentError, match="holds no batch"):
        diagnose(make(), F.cross_entropy, iter([]))
    with pytest.raises(InvalidTypeError, match=r"must yield \(inputs, targets\)"):
        diagnose(make(), F.cross_entropy, iter([3]))
    with pytest.raises(InvalidArgumentError, match="failed without targets"):
        diagnose(make(), F.cross_entropy, iter([torch.randn(3, 4)]))


def test_arguments_that_nothing_can_be_made_of() -> None:
    for arguments in ({"reduction": "average"}, {"sample_dim": {"input": 0}}, {"sample_dim": -1}, {"progress": "bar"}):
        with pytest.raises(SecorderError, match=f"^{next(iter(arguments))} must be"):
            diagnose(make(), F.cross_entropy, *data(10), **arguments)


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    diagnose(make(), F.cross_entropy, *data(10))
    assert capsys.readouterr().out == ""
    diagnose(make(), F.cross_entropy, *data(10), progress=True)
    assert "Curvature" in capsys.readouterr().out
