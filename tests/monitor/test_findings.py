"""What stands out in a model's curvature, by diagnoses of models that are made to."""

import json

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureRecorder, Diagnosis, Finding, diagnose
from secorder.monitor.findings import find, finding
from secorder.monitor.statistics import STATISTICS

from ..helpers import data, make


def kinds(diagnosis: Diagnosis) -> set[tuple[str, str]]:
    return {(finding.kind, finding.layer) for finding in diagnosis.findings}


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
    assert "Nothing stands out." in str(diagnose(nn.Sequential(model[0]), F.mse_loss, inputs, torch.randn(200, 5)))


def test_a_diagnosis_as_text_table_and_json() -> None:
    found = diagnose(make(nn.BatchNorm1d(5), nn.Tanh()), F.cross_entropy, *data(10))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(found)
    for text in (str(found), captured.get()):
        assert "10 samples" in text
        assert "[coupled] there is no Fisher" in text
    written = json.loads(found.to_json(indent=1))
    assert written["hessian_strategies"]["3"] == {
        "strategy": found.hessian.info["3"].strategy,
        "num_hvps": found.hessian.info["3"].num_hvps,
    }
    assert written["findings"][0]["kind"] == "coupled"
    assert written["statistics"]["hessian"]["0"]["trace"] == pytest.approx(found.hessian["0"].sum().item())


ROW = dict.fromkeys(STATISTICS, 0.0) | {"trace": 1.0}


@pytest.mark.parametrize(
    ("kind", "of", "statistic", "at", "before"),
    [
        ("non-finite", "hessian", "nonfinite", 0.01, 0.0),
        ("non-finite", "fisher", "nonfinite", 0.01, 0.0),
        ("dead", "fisher", "zero", 0.5, 0.49),
        ("saddle", "hessian", "negative", 0.25, 0.24),
        ("disagreement", "hessian", "trace", 30.1, 29.9),
        ("disagreement", "hessian", "trace", -30.1, -29.9),
        ("disagreement", "hessian", "trace", 3.3, 3.4),
    ],
)
def test_from_its_threshold_on_and_not_before(kind: str, of: str, statistic: str, at: float, before: float) -> None:
    """Of a loss that is summed over ten samples: the trace of its Hessian is ten times that of the Fisher."""
    with CurvatureProbe(nn.Linear(2, 2)) as probe:
        diagonals = probe.hessian_diagonal(F.mse_loss, torch.randn(3, 2), torch.randn(3, 2), method="exact")

    def found(value: float) -> list[Finding]:
        statistics = {"hessian": {"": ROW | {"trace": 10.0}}, "fisher": {"": dict(ROW)}}
        statistics[of][""][statistic] = value
        return find(diagonals, statistics, 10, None)

    assert [finding.kind for finding in found(at)] == [kind]
    assert found(before) == []


def test_rows_of_a_table_that_nobody_looked_up_are_not_dead() -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(8, 3))
    inputs, targets = torch.randint(5, (6, 2)), torch.randint(3, (6,))
    diagnosis = diagnose(model, F.cross_entropy, inputs, targets, "all")
    assert diagnosis.statistics["fisher"]["0"]["zero"] >= 0.9
    assert "dead" not in {one.kind for one in diagnosis.findings}
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        recorder = CurvatureRecorder(probe, log_every=1)
        F.cross_entropy(model(inputs), targets).backward()
        recorder.step()
    assert "dead" not in {one.kind for one in recorder.findings}


def test_a_finding_says_what_was_measured_and_what_can_be_done() -> None:
    one = finding("edge", "fc", 2.5)
    assert one.measured == "[edge] fc: learning rate times top eigenvalue is 2.5 (threshold 2)"
    assert str(one) == f"{one.measured}: {one.text}"
    assert (
        str(finding("coupled", "", 1.0, "there is no Fisher: a reason.")) == "[coupled] there is no Fisher: a reason."
    )
    assert finding("unreached", "fc", 40.0).measured.endswith("does not depend on is 40")
