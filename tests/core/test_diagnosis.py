"""One-shot diagnostics: of a batch and of a whole data set, findings, and the command line."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import secorder
from secorder import InvalidArgumentError, InvalidTypeError, diagnose

from ..helpers import data, make
from ..reference import assert_all_close, fisher_by_sample, hessian_by_element


def kinds(diagnosis: secorder.Diagnosis) -> set[tuple[str, str]]:
    return {(finding.kind, finding.layer) for finding in diagnosis.findings}


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
        diagnose(make(), F.cross_entropy, iter([torch.randn(3, 4)]))


def test_dead_and_unreached_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(2, 2)
            with torch.no_grad():
                self.a.bias[:4] = -100.0  # dead units

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    found = diagnose(Model(), F.cross_entropy, *data(10))
    assert {("dead", "a"), ("unreached", "unused")} <= kinds(found)
    dead = next(f for f in found.findings if f.kind == "dead" and f.layer == "a")
    assert dead.value == pytest.approx(4 / 6)
    assert dead.threshold == 0.5
    assert "pruned" in str(dead)


def test_a_dominant_layer() -> None:
    model = make(nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    with torch.no_grad():
        model[4].weight.mul_(1e-3)
        model[3].register_forward_hook(lambda m, a, out: out * 100)
    assert ("dominant", "4") in kinds(diagnose(model, F.mse_loss, torch.randn(8, 4), torch.randn(8, 3)))


def test_saddles_and_disagreement() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    loss_fn = lambda f, t: -(f**2).sum(1).mean() + 10 * f.sum(1).mean()  # noqa: E731
    found = diagnose(model, loss_fn, torch.randn(8, 3), torch.zeros(8))
    assert {("saddle", "0"), ("disagreement", "0")} <= kinds(found)
    assert next(f for f in found.findings if f.kind == "saddle").value == 1.0


def test_entries_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    loss_fn = lambda f, t: (f * 0 + 1e-200).sqrt().sum() + (f**2).sqrt().sum() * 0  # noqa: E731
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    found = diagnose(model, loss_fn, torch.randn(4, 2), torch.zeros(4))
    assert ("non-finite", "0") in kinds(found)


def test_coupled_samples_are_a_finding() -> None:
    model = make(nn.BatchNorm1d(5), nn.Tanh())
    found = diagnose(model, F.cross_entropy, *data(10))
    assert found.fisher is None
    assert ("coupled", "") in kinds(found)
    assert "tr H" in str(found)


def test_nothing_stands_out() -> None:
    model, (inputs, _) = make(), data(200)
    with torch.no_grad():
        labels = torch.distributions.Categorical(logits=model(inputs)).sample()
    assert "Nothing stands out." in str(diagnose(nn.Sequential(model[0]), F.mse_loss, inputs, torch.randn(200, 5)))
    assert diagnose(model, F.cross_entropy, inputs, labels, progress=True).num_samples == 200


# ---- command line
