"""The recorder, against brute force."""

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureRecorder, CurvatureWarning, InvalidArgumentError, InvalidTypeError
from secorder.monitor.sinks.json_lines import points

from ..helpers import Taking, data, make, no_warnings, reference, run_ranks


def trained(steps: int, **options: Any) -> tuple[CurvatureRecorder, list[dict[str, Tensor]], list[float]]:
    """A recorder after some steps, the brute-force Fisher of each step's batch, and the losses."""
    model = make()
    probe = CurvatureProbe(model, reduction="mean")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    held = data(8)
    recorder = CurvatureRecorder(
        probe, options.pop("sinks", None), optimizer=optimizer, loss_fn=F.cross_entropy, batch=held, strict=True,
        on_finding=lambda change: None, **options,
    )  # fmt: skip
    fishers, losses = [], []
    for _ in range(steps):
        batch = data()
        fishers.append(reference(model, batch))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        recorder.step(loss=loss)
        losses.append(loss.item())
    return recorder, fishers, losses


def test_each_point_is_of_the_time_since_the_last() -> None:
    recorder, fishers, losses = trained(6, log_every=2, norms_every=3, histograms_every=None)
    assert repr(recorder) == "CurvatureRecorder(6 steps; fisher every 2, norms every 3)"
    table = recorder.history.to_dict()
    assert table["step"] == [2, 3, 4, 6]
    for place, (first, second) in {0: (0, 1), 2: (2, 3), 3: (4, 5)}.items():
        expected = sum((fishers[n]["0.weight"].sum() + fishers[n]["0.bias"].sum()) / 2 for n in (first, second))
        assert table["fisher_trace/0"][place] == pytest.approx(float(expected), rel=1e-9)
        assert table["model/loss"][place] == pytest.approx((losses[first] + losses[second]) / 2)
        whole = table["fisher_trace/0"][place] + table["fisher_trace/2"][place]
        assert table["model/fisher_trace"][place] == pytest.approx(whole)
    assert table["model/learning_rate"][0] == 0.5
    assert table["update_to_weight/0"][1] > 0


def test_a_moving_average_is_told_as_it_is() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model, reduction="mean", decay=0.5)
    recorder = CurvatureRecorder(probe, log_every=1)
    for _ in range(3):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        recorder.step()
    expected = probe.fisher_diagonal()["0"].sum().item()
    assert recorder.history.to_dict()["fisher_trace/0"][-1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("accumulate", ["trace", "diagonal"])
def test_traces_and_noise_of_the_time_since_the_last_point(accumulate: Any) -> None:
    model = make()
    probe = CurvatureProbe(model, reduction="mean", accumulate=accumulate)
    other = CurvatureProbe(model, reduction="mean", accumulate="trace")
    recorder = CurvatureRecorder(probe, log_every=2, strict=True)
    for number in range(4):
        batch = data(12)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        recorder.step()
        if number == 1:
            other.reset()
    table = recorder.history.to_dict()
    traces = other.fisher_trace()
    assert [table[f"fisher_trace/{name}"][-1] for name in traces] == pytest.approx([t.value for t in traces.values()])
    noise = other.gradient_noise_scale()
    assert accumulate == "diagonal" or table["gradient_noise_scale/0"][-1] == pytest.approx(noise["0"].value)
    assert accumulate == "diagonal" or table["model/gradient_noise_scale"][-1] == pytest.approx(noise.total.value)


def test_what_is_measured_on_a_batch_that_is_held() -> None:
    recorder, _, _ = trained(4, hessian_every=2, traces_every=1, eigenvalues_every=4, log_every=None, norms_every=None)
    table = recorder.history.to_dict()
    model, held = recorder._probe._model, recorder._measured_on[1:]  # type: ignore[attr-defined]
    probe = CurvatureProbe(model)
    hessian = probe.hessian_diagonal(F.cross_entropy, *held, method="exact")
    assert table["step"] == [1, 2, 3, 4]
    assert table["hessian_trace/2"][-1] == pytest.approx(hessian["2"].sum().item(), rel=1e-9)
    assert table["hessian_negative/0"][-1] == pytest.approx((hessian["0"] < 0).double().mean().item())
    top = probe.hessian_eigenvalues(F.cross_entropy, *held)["0"].top[0]
    assert table["hessian_top_eigenvalue/0"][-1] == pytest.approx(top, rel=1e-3)
    assert table["learning_rate_times_eigenvalue/0"][-1] == pytest.approx(0.5 * top, rel=1e-3)
    assert all(table[f"model/seconds_{name}"][-1] > 0 for name in ("hessian", "eigenvalues"))


def test_numbers_go_to_every_sink(tmp_path: Path) -> None:
    taking = Taking()
    recorder, _, _ = trained(2, sinks=[taking, tmp_path / "run.jsonl", tmp_path / "run.csv"], log_every=1)
    assert [step for step, _ in taking.points] == [1, 2]
    lines = [point for point in points(tmp_path / "run.jsonl") if "findings" not in point]
    assert lines[-1]["fisher_trace/0"] == taking.points[-1][1]["fisher_trace/0"]
    assert lines[-1]["step"] == 2
    recorder.close()


def test_a_probe_that_sees_nothing_is_told_once_and_one_that_left_all_out_is_not() -> None:
    model, batch, other = make(), data(), make()
    with CurvatureProbe(other, reduction="mean", every=2) as probe:
        recorder = CurvatureRecorder(probe, log_every=1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(4):
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                recorder.step(loss=1.0)
            (F.cross_entropy(other(batch[0]), batch[1]) * torch.inf).backward()
            recorder.step()
        words = (
            "no batch went through the probe's model in",
            "[non-finite] 0: share of numbers that are nan or infinite is 1",
        )
        assert [next(w for w in words if w in str(one.message)) for one in told] == list(words)
        log = CurvatureRecorder(probe, log_every=4)
        for _ in range(3):
            log.step(loss=1.0)
        with pytest.warns(CurvatureWarning, match="no batch went through the probe's model in 4 steps"):
            log.step(loss=1.0)
        with no_warnings():
            for _ in range(4):
                log.step(loss=1.0)
        assert len(log.history.points("model")) == 2


def test_training_goes_on_whatever_fails() -> None:
    class Broken(Taking):
        def scalars(self, step: int, numbers: Any) -> None:
            raise OSError("no space left on device")

    model, batch = make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    whole = Taking()

    def no_loss(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError("no such loss")

    recorder = CurvatureRecorder(probe, [Broken(), whole], log_every=1, hessian_every=1, loss_fn=no_loss, batch=batch)

    def train() -> None:
        for _ in range(3):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            recorder.step()

    with pytest.warns(CurvatureWarning) as told:
        train()
    messages = [str(warning.message) for warning in told]
    assert len([m for m in messages if "Broken could not be written to" in m and "no space left" in m]) == 1
    assert len([m for m in messages if "could not log its hessian" in m and "no such loss" in m]) == 1
    assert len(whole.points) == 3
    strict = CurvatureRecorder(probe, Broken(), log_every=1, strict=True)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    with pytest.raises(OSError, match="no space"):
        strict.step()


def test_the_model_trains_as_without() -> None:
    def weights(watched: bool) -> list[Tensor]:
        model, batch, held = make(), data(), data()
        optimizer = torch.optim.Adam(model.parameters())
        every: dict[str, Any] = dict.fromkeys(("log_every", "norms_every", "hessian_every", "eigenvalues_every"), 1)
        if watched:
            probe = CurvatureProbe(model, reduction="mean")
            recorder = CurvatureRecorder(
                probe, Taking(), loss_fn=F.cross_entropy, batch=held, on_finding=print, **every
            )
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            if watched:
                recorder.step()
        return [*model.parameters(), torch.rand(3)]

    assert all(torch.equal(a, b) for a, b in zip(weights(False), weights(True), strict=True))


def test_a_run_goes_on_from_its_state() -> None:
    one, _, _ = trained(7, log_every=4)
    other, _, _ = trained(0, log_every=4)
    other.load_state_dict(one.state_dict())
    other.step(loss=1.0)
    assert other.history.to_dict()["step"][0] == 4
    assert other.history.to_dict()["model/loss"][-1] == pytest.approx((float(one._loss[0]) + 1) / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"hessian_every": 0}, "hessian_every must be"),
        ({"method": "Exact"}, 'method must be "auto", "exact" or'),
        ({"which": "up"}, "which must be"),
        ({"hessian_every": 5}, "hessian_every needs loss_fn= and batch="),
        ({"eigenvalues_every": 5}, "eigenvalues_every needs loss_fn= and batch="),
        ({"every": 5}, "takes log_every= in place of every="),
        ({"methods": "exact"}, "no option 'methods'"),
    ],
)
def test_recorder_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        CurvatureRecorder(CurvatureProbe(make()), Taking(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sinks": 3}, r"a sink has scalars\(step"),
        ({"norms_every": 2.5}, "norms_every must be an integer"),
        ({"optimizer": "sgd"}, "optimizer must have param_groups"),
        ({"on_finding": "print"}, "on_finding must be callable"),
        ({"strict": "yes"}, "strict must be True or False"),
        ({"keep_total": None}, "keep_total must be True or False"),
        ({"synchronize": 2}, "synchronize must be True or False"),
    ],
)
def test_recorder_refuses_what_has_a_wrong_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTypeError, match=message):
        CurvatureRecorder(CurvatureProbe(make()), **arguments)


def test_a_loss_in_the_place_of_the_step_is_told_of_and_kept_nowhere() -> None:
    """``recorder.step(loss)``: points go by the count, and no graph is held."""
    model, (inputs, targets) = make(), data()

    def train() -> None:
        for _ in range(3):
            loss: Any = F.cross_entropy(model(inputs), targets)
            loss.backward()
            recorder.step(loss)

    with CurvatureProbe(model, reduction="mean") as probe:
        recorder = CurvatureRecorder(probe, log_every=1, norms_every=None, on_finding=print)
        with pytest.warns(CurvatureWarning) as told:
            train()
        (message,) = (str(warning.message) for warning in told)
        assert "step must be an integer, got a Tensor of shape (): the loss goes into loss=." in message
        assert recorder.history.to_dict()["step"] == [1, 2, 3]


def test_what_is_no_number_or_no_state_is_refused_and_changes_nothing() -> None:
    given: Any
    with CurvatureProbe(make(), reduction="mean") as probe:
        recorder = CurvatureRecorder(probe)
        recorder.log({"accuracy": 0.5}, 7)
        before = recorder.state_dict()
        for given in (3, None, [0.5]):
            with pytest.raises(InvalidTypeError, match="numbers must be a mapping"):
                recorder.log(given)
        given = 1.5
        with pytest.raises(InvalidTypeError, match="step must be an integer"):
            recorder.log({"accuracy": 0.5}, given)
        for given in (None, {}, {"steps": 3}):
            with pytest.raises(InvalidArgumentError, match=r"not one of CurvatureRecorder.state_dict\(\)"):
                recorder.load_state_dict(given)
        with pytest.raises(InvalidTypeError, match="top must be an integer"):
            recorder.plot("model", top="all")  # type: ignore[arg-type]
        assert recorder.state_dict() == before


@pytest.mark.slow
def test_ranks_log_what_one_process_logs_of_all_samples_and_the_first_writes() -> None:
    run_ranks("recorder", 2)


def test_whatever_fails_training_goes_on(tmp_path: Path) -> None:
    """A name that no picture can show, a function of the user's that raises, a loss that is no number."""
    model = nn.Sequential(OrderedDict([("ü\n", nn.Linear(3, 2)), ("b", nn.Linear(2, 2))]))

    def tell(change: Any) -> None:
        raise ValueError("mine")

    with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder = CurvatureRecorder(probe, str(tmp_path / "run"), log_every=1, norms_every=None, on_finding=tell)
        for scale, loss in ((1.0, "high"), (1e3, torch.ones(2)), (1e3, 0.5)):
            model(scale * torch.ones(4, 3)).square().mean().backward()
            recorder.step(loss=loss)
    recorder.close()
    told = "\n".join(str(one.message) for one in caught)
    assert "'loss' must be a number" in told
    assert "ValueError: mine" in told
    assert "multiline" not in told
    assert recorder.history.to_dict()["step"] == [1, 2, 3]
    assert recorder.history.to_dict()["model/loss"][-1] == 0.5


def test_batches_that_another_recorder_takes_out_are_told_as_such() -> None:
    model = nn.Linear(3, 2)
    with CurvatureProbe(model, reduction="mean") as probe:
        first, second = (CurvatureRecorder(probe, log_every=1, norms_every=None) for _ in range(2))
        model(torch.ones(4, 3)).square().mean().backward()
        first.step()
        with pytest.warns(CurvatureWarning, match="another recorder"):
            second.step()


def test_what_cannot_be_watched_is_refused_at_once(tmp_path: Path) -> None:
    model: Any = nn.Linear(3, 2)
    (tmp_path / "file").write_text("")
    with CurvatureProbe(model, reduction="mean") as probe:
        with pytest.raises(InvalidTypeError, match="a CurvatureProbe, got Linear"):
            CurvatureRecorder(model)
        with pytest.raises(InvalidTypeError, match="batch must be a pair"):
            CurvatureRecorder(probe, hessian_every=1, loss_fn=nn.MSELoss(), batch=torch.ones(2, 3))  # type: ignore
        with pytest.raises(InvalidArgumentError, match="cannot be written to"):
            CurvatureRecorder(probe, str(tmp_path / "file" / "run.csv"))
        recorder = CurvatureRecorder(probe, str(tmp_path / "run.jsonl"))
        recorder.log({"accuracy": torch.tensor(0.5)})
        with pytest.raises(InvalidTypeError, match="'accuracy' must be a number"):
            recorder.log({"accuracy": "high"})  # type: ignore[dict-item]
        recorder.close()
    assert '"model/accuracy": 0.5' in (tmp_path / "run.jsonl").read_text()


def test_a_training_that_ends_in_nan_is_told_whatever_is_measured() -> None:
    model, batch = make(nn.Tanh(), nn.Linear(5, 5)), data()
    found: list[Any] = []
    with CurvatureProbe(model, reduction="mean") as probe:
        recorder = CurvatureRecorder(probe, log_every=2, on_finding=found.append)
        for step in range(6):
            if step == 3:  # the second point has seen a batch before
                model[2].weight.data[0, 0] = torch.nan
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            recorder.step(loss=loss)
    bad = [(change.step, change.finding.layer) for change in found if change.finding.kind == "non-finite"]
    assert bad == [(4, ""), *((6, name) for name in probe.layer_names)]  # the loss, and where no gradient was left


def test_steps_and_losses_of_any_kinds(tmp_path: Path) -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        recorder = CurvatureRecorder(probe, [tmp_path / "run.jsonl", tmp_path / "run.csv"], log_every=1)
        for step in (np.int64(1), torch.tensor(2), 3):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            recorder.step(step, loss=np.float32(0.5))
        rare = CurvatureRecorder(probe, log_every=1000)
        for _ in range(1000):  # in bfloat16 a sum stops at 256 times what is added
            rare.step(loss=torch.tensor(1.0, dtype=torch.bfloat16))
    assert recorder.history.to_dict()["step"] == [1, 2, 3]
    assert [p["step"] for p in points(tmp_path / "run.jsonl") if "findings" not in p] == [1, 2, 3]
    assert (tmp_path / "run.csv").read_text().splitlines()[-1].startswith("3,")
    assert rare.history.to_dict()["model/loss"][-1] == 1.0
