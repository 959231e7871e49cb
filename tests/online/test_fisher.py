"""What the hooks tell is checked and added up: scales, averages, bad batches, precision, states."""

import io
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import (
    AttributionError,
    CurvatureProbe,
    CurvatureWarning,
    InvalidArgumentError,
    NonFiniteError,
    ProbeStateError,
)
from secorder.layers import contraction
from secorder.layers.side_by_side import SideBySide
from secorder.online import fisher

from ..helpers import Net, data, make, reference, step
from ..reference import assert_all_close


@pytest.mark.parametrize("given", [0.25, lambda: 0.25, torch.amp.GradScaler("cpu", init_scale=0.25)])
def test_the_loss_scale_is_divided_out(given: Any) -> None:
    model, batch = make(), data()
    if isinstance(given, torch.amp.GradScaler):
        given.scale(torch.ones(()))  # its scale is made at the first use
    probe = CurvatureProbe(model, loss_scale=given, reduction="mean")
    step(model, batch, 0.25)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_the_loss_scale_is_asked_for_once_in_a_backward() -> None:
    """On an accelerator, a scaler waits for all that was launched."""
    asked = []
    model, batch = make(), data()
    with CurvatureProbe(model, loss_scale=lambda: asked.append(1) or 0.25, reduction="mean") as probe:
        for number in (1, 2, 3):
            step(model, batch, 0.25)
            assert len(asked) == number
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(make(), batch))


def test_a_loss_scale_that_nothing_can_be_divided_by() -> None:
    model, batch = make(), data()
    told = iter([1.0, 0.0, float("nan"), float("inf"), 1.0])
    with CurvatureProbe(model, loss_scale=lambda: next(told), reduction="mean") as probe:
        for _ in range(5):
            step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(make(), batch))
        assert float(probe._fisher.sums["0"].counts[2]) == 2


def _no_scale() -> float:
    raise KeyError("amp")


@pytest.mark.parametrize(
    ("given", "reason"),
    [(_no_scale, "loss_scale= raised KeyError: 'amp'. It is called"), (lambda: [1.0, 2.0], "loss_scale= returned")],
)
def test_a_loss_scale_that_cannot_be_told_is_named(given: Any, reason: str) -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, loss_scale=given, reduction="mean") as probe:
        with pytest.warns(CurvatureWarning, match=reason):
            step(model, batch)
        with pytest.raises(AttributionError, match=reason):
            probe.fisher_diagonal()
        with pytest.raises(InvalidArgumentError, match=reason):
            probe.verify(F.cross_entropy, *batch)


@pytest.mark.parametrize("given", [0.0, -1.0, "big", torch.amp.GradScaler])
def test_a_loss_scale_that_is_none(given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="loss_scale"):
        CurvatureProbe(make(), loss_scale=given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_is_skipped_and_counted(bad: float) -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    step(model, (batch[0] * bad, batch[1]))
    step(model, batch)
    assert probe.num_samples == 12
    assert probe.num_skipped == {"0": 1, "2": 1}
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_a_bad_batch_raises_or_is_kept() -> None:
    model, batch = make(), data()
    bad = batch[0] * float("nan"), batch[1]
    with CurvatureProbe(model, on_nonfinite="raise", reduction="mean") as probe:
        step(model, batch)
        with pytest.raises(NonFiniteError, match="layer '2'"):
            step(model, bad)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    with CurvatureProbe(model, on_nonfinite="keep", reduction="mean") as probe:
        step(model, batch)
        step(model, bad)
        assert probe.fisher_diagonal()["0"].isnan().any()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, bad)
        assert probe.num_skipped == {"0": 1, "2": 1}
        with pytest.raises(ProbeStateError, match="nothing is accumulated"):
            probe.fisher_diagonal()
    with pytest.raises(InvalidArgumentError, match="on_nonfinite"):
        CurvatureProbe(model, on_nonfinite="ignore", reduction="mean")  # type: ignore[arg-type]


def test_accumulators_of_another_dtype() -> None:
    model, batch = make().float(), data()
    batch = batch[0].float(), batch[1]
    probe = CurvatureProbe(model, accumulator_dtype=torch.float64, accumulator_device="cpu", reduction="mean")
    step(model, batch)
    found = probe.fisher_diagonal()
    assert found["0"].dtype == torch.float64
    assert_all_close(found.by_parameter(), reference(model, batch), 1e-5)


RUN = """
import os, signal, sys, torch
from torch import nn
from secorder import CurvatureProbe
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = CurvatureProbe(model, every=2, decay=0.9)
path, kill_at = sys.argv[1], int(sys.argv[2])
start = 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"]); probe.load_state_dict(saved["probe"]); start = saved["step"]
for index in range(start, 20):
    torch.manual_seed(index)
    inputs, targets = torch.randn(6, 4), torch.randint(3, (6,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "probe": probe.state_dict(), "step": index + 1}, path + ".new")
    os.replace(path + ".new", path)
    if index == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
torch.save(probe.state_dict(), path + ".end")
"""


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    def run(path: Path, kill_at: int) -> int:
        return subprocess.run([sys.executable, "-c", RUN, str(path), str(kill_at)], check=False).returncode

    assert run(tmp_path / "whole", -1) == 0
    assert run(tmp_path / "killed", 6) == -signal.SIGKILL
    assert run(tmp_path / "killed", -1) == 0
    whole, killed = (torch.load(tmp_path / f"{name}.end", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_the_state_is_flat_tensors_for_safetensors_and_distributed_checkpoints(tmp_path: Path) -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    state = probe.state_dict()
    assert all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    other = CurvatureProbe(model, reduction="mean")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "probe.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "probe.safetensors"))
    assert_all_close(other.fisher_diagonal(), probe.fisher_diagonal(), 0.0)

    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"probe": state}, checkpoint_id=tmp_path / "dcp")
        empty = {"probe": CurvatureProbe(model, reduction="mean").state_dict()}
        dcp.load(empty, checkpoint_id=tmp_path / "dcp")
    third = CurvatureProbe(model, reduction="mean")
    third.load_state_dict(empty["probe"])
    assert_all_close(third.fisher_diagonal(), probe.fisher_diagonal(), 0.0)


class Overflows(nn.Module):
    """Gradients that half precision does not hold become infinite."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda g: torch.where(g.abs() > torch.finfo(torch.float16).max, torch.inf, g))
        return x


def test_steps_that_a_grad_scaler_skips_are_counted() -> None:
    model, batch = make(Overflows()), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with CurvatureProbe(model, layers="0", loss_scale=scaler, reduction="mean") as probe:
        skipped = 0
        for _ in range(10):
            optimizer.zero_grad()
            scale = scaler.get_scale() if skipped else 2.0**22
            scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < scale
        assert 0 < skipped < 10
        assert probe.num_skipped == {"0": skipped}
        assert probe.num_samples == 6 * (10 - skipped)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_decay_is_a_bias_corrected_moving_average() -> None:
    model = make()
    probe = CurvatureProbe(model, decay=0.9, reduction="mean")
    average, weight = {}, 0.0
    for count in (6, 3, 4):
        batch = data(count)
        step(model, batch)
        for name, value in reference(model, batch).items():
            average[name] = 0.9 * average.get(name, 0) + 0.1 * value
        weight = 0.9 * weight + 0.1
    assert_all_close(probe.fisher_diagonal().by_parameter(), {k: v / weight for k, v in average.items()})


def test_state_dict_survives_a_checkpoint() -> None:
    model = make()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, data())
    buffer = io.BytesIO()
    torch.save(probe.state_dict(), buffer)
    buffer.seek(0)
    resumed = CurvatureProbe(model, reduction="mean")
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    probe.detach()
    assert resumed.num_samples == 6
    assert_all_close(resumed.fisher_diagonal(), probe.fisher_diagonal(), 0.0)
    step(model, data())
    assert resumed.num_samples == 12
    assert probe.num_samples == 6


@pytest.mark.parametrize("other", ["layers", "shape", "decay", "garbage"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(other: str) -> None:
    model = make()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, data())
    before = probe.fisher_diagonal()
    if other == "garbage":
        state = {"a": 1}
    elif other == "layers":
        state = CurvatureProbe(nn.Sequential(nn.Linear(4, 5)), reduction="mean").state_dict()  # without layer 2
    elif other == "decay":
        state = CurvatureProbe(model, decay=0.5, reduction="mean").state_dict()
    else:
        state = CurvatureProbe(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), reduction="mean"
        ).state_dict()
    with pytest.raises(InvalidArgumentError):
        probe.load_state_dict(state)
    assert_all_close(probe.fisher_diagonal(), before, 0.0)


def test_layer_not_reached_by_the_loss_has_zeros() -> None:
    parts = {name: nn.Linear(4, 3) for name in ("used", "unused", "cut")}
    model, batch = Net(lambda m, x: m.used(x) + m.cut(x).detach(), **parts), data()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    found = probe.fisher_diagonal()
    assert found["unused"].abs().max() == found["cut"].abs().max() == 0
    assert_all_close(found.by_parameter(), reference(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    model, batch = make(), data()
    expected = reference(model, batch)
    model.to(dtype)
    probe = CurvatureProbe(model, reduction="mean")
    step(model, (batch[0].to(dtype), batch[1]))
    found = probe.fisher_diagonal()
    assert {d.dtype for d in found.values()} == {torch.float32}
    assert_all_close(found.by_parameter(), expected, 5e-2)


@pytest.mark.parametrize("interrupt", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["add_to", "count_together"])
def test_sums_that_hold_a_part_of_a_batch_are_not_told(
    interrupt: type[BaseException], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off before the first parameter's sum nothing is lost; after it, the layer says so."""
    model, batch = make(), data()

    def breaks_off(*_: Any, **__: Any) -> None:
        raise interrupt

    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batch)
        state = probe.state_dict()
        monkeypatch.setattr(SideBySide if at == "add_to" else fisher, at, breaks_off)
        if interrupt is KeyboardInterrupt:  # the user's, and so it goes through
            with pytest.raises(KeyboardInterrupt):
                step(model, batch)
        else:
            with pytest.warns(CurvatureWarning, match="MemoryError"):
                step(model, batch)
        monkeypatch.undo()
        step(model, batch)
        if at == "count_together":
            with pytest.raises(AttributionError, match="broken off"):
                probe.fisher_diagonal()
            probe.load_state_dict(state)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_large_parameters_are_added_to_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contraction, "IN_PLACE_ELEMENTS", 0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(2), nn.Linear(4, 3), nn.Flatten())
    inputs, targets = torch.randn(6, 2, 3, 3), torch.randint(9, (6,))
    for options in ({}, {"decay": 0.5}, {"loss_scale": 1.0}):
        with CurvatureProbe(model, reduction="mean", **options) as probe:
            for _ in range(2):
                step(model, (inputs, targets))
            assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, (inputs, targets)))
