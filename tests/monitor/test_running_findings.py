"""What stands out while a model trains, told once when it begins and once when it ends."""

import pytest
import torch
import torch.nn.functional as F

from secorder import CurvatureProbe, CurvatureRecorder, CurvatureWarning
from secorder.monitor.running_findings import Change, Observation, RunningFindings
from secorder.monitor.statistics import layer_statistics

from ..helpers import Taking, make, no_warnings


def seen(findings: RunningFindings, step: int, **numbers: dict[str, float]) -> list[tuple[str, str, bool]]:
    changes = findings.update(Observation(numbers=dict(numbers)), step)
    return [(change.finding.kind, change.finding.layer, change.begins) for change in changes]


def silent(change: Change) -> None:
    """Tell nobody."""


def test_a_trace_that_grows_tenfold() -> None:
    findings = RunningFindings(silent)
    told = [seen(findings, step, fisher_trace={"a": 2.0**step, "b": 1.0}) for step in range(6)]
    assert told == [[], [], [], [], [("growing", "a", True)], []]
    told = [seen(findings, step, fisher_trace={"a": 32.0, "b": 1.0}) for step in range(6, 20)]
    assert [step for step, changes in enumerate(told, start=6) if changes] == [13]  # ten points ago it was 8
    assert told[7] == [("growing", "a", False)]


def test_a_number_that_hovers_about_its_threshold_is_told_once() -> None:
    findings = RunningFindings(silent)
    told = [seen(findings, n, learning_rate_times_eigenvalue={"a": x}) for n, x in enumerate((1.9, 2.1, 1.9, 2.1, 1.5))]
    assert told == [[], [("edge", "a", True)], [], [], [("edge", "a", False)]]


def test_what_was_not_looked_at_does_not_end() -> None:
    findings = RunningFindings(silent)
    seen(findings, 1, learning_rate_times_eigenvalue={"a": 3.0})
    assert seen(findings, 2, fisher_trace={"a": 1.0}) == []
    assert [finding.kind for finding in findings.now] == ["edge"]
    other = RunningFindings(silent)
    other.load_state_dict(findings.state_dict())
    assert seen(other, 3, learning_rate_times_eigenvalue={"a": 1.0}) == [("edge", "a", False)]


def test_noise_is_held_against_the_batch() -> None:
    """Signal and noise are averaged before the ratio, over points enough."""
    findings = RunningFindings(silent)
    told = [findings.update(Observation(batch_size=8.0, noise=pair), 1) for pair in ((-1.0, 40.0), (1.0, 2.0))]
    assert told == [[], []]
    (change,) = findings.update(Observation(batch_size=8.0, noise=(4.0, 38.0)), 3)
    assert (change.finding.kind, change.finding.value) == ("noisy", 80.0 / 4.0 / 8.0)
    assert findings.update(Observation(batch_size=8.0), 4) == []
    (change,) = findings.update(Observation(batch_size=8.0, noise=(96.0, 0.0)), 5)
    assert (change.begins, change.finding.value) == (False, 0.1)
    lost = RunningFindings(silent)
    changes = [lost.update(Observation(batch_size=8.0, noise=(-1.0, 40.0)), n) for n in range(4)]
    assert [len(found) for found in changes] == [0, 0, 1, 0]
    assert changes[2][0].finding.value == float("inf")


def test_shares_of_diagonals() -> None:
    findings = RunningFindings(silent)
    fisher = layer_statistics({"dead": torch.tensor([0.0, 0.0, 1.0]), "bad": torch.tensor([1.0, torch.nan])})
    hessian = layer_statistics({"dead": torch.tensor([-1.0, 1.0, 1.0])})
    traces = {"fisher_trace": {"dead": 1.0, "x": 30.0, "y": 1.0}}
    changes = findings.update(Observation(traces, fisher, hessian), 1)
    found = {(change.finding.kind, change.finding.layer) for change in changes}
    assert found == {("dead", "dead"), ("non-finite", "bad"), ("saddle", "dead"), ("dominant", "x")}


def test_layers_with_the_same_finding_share_a_warning() -> None:
    findings = RunningFindings()
    fisher = {f"layer{i}": {"nonfinite": 0.0, "zero": 1.0} for i in range(100)}
    with pytest.warns(CurvatureWarning) as told:
        findings.update(Observation(fisher=fisher), 7)
    assert len(told) == 1
    assert "step 7: [dead] layer0" in str(told[0].message)
    assert "and 99 more: layer1, layer2, layer3" in str(told[0].message)


def test_a_layer_that_dies_in_training_is_told_in_the_log_too() -> None:
    model = make(torch.nn.ReLU())
    sink = Taking()
    changes: list[Change] = []
    probe = CurvatureProbe(model, reduction="mean")
    recorder = CurvatureRecorder(probe, sink, log_every=1, on_finding=changes.append)
    inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
    for step in range(6):
        with torch.no_grad():
            model[0].bias.fill_(-100.0 if step in (2, 3) else 100.0)
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        recorder.step()
    told = [(c.step, c.begins) for c in changes if (c.finding.kind, c.finding.layer) == ("dead", "0")]
    assert told == [(3, True), (5, False)]
    text = next(text for step, name, text in sink.texts if step == 3)
    assert "- [dead] 0: share of parameters with no gradient" in text
    with no_warnings():
        assert [finding for finding in recorder.findings if finding.kind == "dead"] == []


def test_one_warning_for_several_layers_names_them_and_an_end_gives_no_advice() -> None:
    findings = RunningFindings()
    with pytest.warns(CurvatureWarning) as begin:
        seen(findings, 1, learning_rate_times_eigenvalue=dict.fromkeys("abcde", 3.0))
    with pytest.warns(CurvatureWarning) as end:
        seen(findings, 2, learning_rate_times_eigenvalue={**dict.fromkeys("abc", 1.0), **dict.fromkeys("de", 3.0)})
    (begins,), (ends,) = ([str(warning.message) for warning in told] for told in (begin, end))
    assert begins.startswith("step 1: [edge] a: learning rate times top eigenvalue is 3 (threshold 2): beyond 2")
    assert begins.endswith("(and 4 more: b, c, d …)")
    ended = "step 2: no longer [edge] a: learning rate times top eigenvalue is 1 (threshold 2) (and 2 more: b, c)"
    assert ends == ended
