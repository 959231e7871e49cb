"""What long runs meet: overflow, loss scaling, compilation, interruption, threads, exceptions."""

import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError, NonFiniteError, ProbeStateError
from secorder.accumulation import Accumulation
from secorder.capture import Capture

from .reference import assert_all_close, fisher_by_sample


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4), torch.randint(3, (count,))


def step(model: nn.Module, batch: tuple[Tensor, Tensor], scale: float = 1.0) -> None:
    (F.cross_entropy(model(batch[0]), batch[1]) * scale).backward()


def reference(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return fisher_by_sample(model, F.cross_entropy, *batch, len(batch[0]))


# ---- loss scales and bad batches


@pytest.mark.parametrize("given", [0.25, lambda: 0.25, torch.amp.GradScaler("cpu", init_scale=0.25)])
def test_the_loss_scale_is_divided_out(given: Any) -> None:
    model, batch = make(), data()
    if isinstance(given, torch.amp.GradScaler):
        given.scale(torch.ones(()))  # its scale is made at the first use
    probe = CurvatureProbe(model, loss_scale=given)
    step(model, batch, 0.25)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


@pytest.mark.parametrize("given", [0.0, -1.0, "big"])
def test_a_loss_scale_that_is_none(given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="loss_scale"):
        CurvatureProbe(make(), loss_scale=given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_is_skipped_and_counted(bad: float) -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model)
    step(model, batch)
    step(model, (batch[0] * bad, batch[1]))
    step(model, batch)
    assert probe.num_samples == 12
    assert probe.num_skipped == {"0": 1, "2": 1}
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_a_bad_batch_raises_or_is_kept() -> None:
    model, batch = make(), data()
    bad = batch[0] * float("nan"), batch[1]
    with CurvatureProbe(model, on_nonfinite="raise") as probe:
        step(model, batch)
        with pytest.raises(NonFiniteError, match="layer '2'"):
            step(model, bad)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    with CurvatureProbe(model, on_nonfinite="keep") as probe:
        step(model, batch)
        step(model, bad)
        assert probe.fisher_diagonal()["0"].isnan().any()
    with CurvatureProbe(model) as probe:
        step(model, bad)
        assert probe.num_skipped == {"0": 1, "2": 1}
        with pytest.raises(ProbeStateError, match="nothing is accumulated"):
            probe.fisher_diagonal()
    with pytest.raises(InvalidArgumentError, match="on_nonfinite"):
        CurvatureProbe(model, on_nonfinite="ignore")  # type: ignore[arg-type]


def test_accumulators_of_another_dtype() -> None:
    model, batch = make().float(), data()
    batch = batch[0].float(), batch[1]
    probe = CurvatureProbe(model, accumulator_dtype=torch.float64, accumulator_device="cpu")
    step(model, batch)
    found = probe.fisher_diagonal()
    assert found["0"].dtype == torch.float64
    assert_all_close(found.by_parameter(), reference(model, batch), 1e-5)


# ---- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.filterwarnings("ignore")
def test_compiled_models(order: str, every: int) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, batch = make(), data()
    probe = CurvatureProbe(model, every=every) if order == "before" else None
    compiled = torch.compile(model, backend="aot_eager")
    probe = probe or CurvatureProbe(model, every=every)
    graphs = []
    for _ in range(6):
        F.cross_entropy(compiled(batch[0]), batch[1]).backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert probe.num_samples == 36 // every
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(make(), batch))
    assert graphs[-1] == graphs[1]  # no recompilation
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_probe_that_a_compiled_model_ignores_says_so() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model, batch = make(), data()
    compiled = torch.compile(model, backend="aot_eager")
    F.cross_entropy(compiled(batch[0]), batch[1]).backward()
    probe = CurvatureProbe(model)
    F.cross_entropy(compiled(batch[0]), batch[1]).backward()
    with pytest.raises(ProbeStateError, match=r"torch\.compile"):
        probe.fisher_diagonal()
    torch._dynamo.reset()


# ---- durability

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
    probe = CurvatureProbe(model)
    step(model, batch)
    state = probe.state_dict()
    assert all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    other = CurvatureProbe(model)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "probe.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "probe.safetensors"))
    assert_all_close(other.fisher_diagonal(), probe.fisher_diagonal(), 0.0)

    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"probe": state}, checkpoint_id=tmp_path / "dcp")
        empty = {"probe": CurvatureProbe(model).state_dict()}
        dcp.load(empty, checkpoint_id=tmp_path / "dcp")
    third = CurvatureProbe(model)
    third.load_state_dict(empty["probe"])
    assert_all_close(third.fisher_diagonal(), probe.fisher_diagonal(), 0.0)


# ---- soak


class Throws(nn.Module):
    """Raises in forward or in backward when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.when = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "forward" and torch.is_grad_enabled():
            raise KeyError("forward")
        if self.when == "backward" and x.requires_grad:
            x = x * 1
            x.register_hook(self.fail)
        return x

    def fail(self, g: Tensor) -> None:
        raise KeyError("backward")


def broken_step(model: nn.Module, batch: tuple[Tensor, Tensor], in_loss: bool) -> None:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    if in_loss:
        raise ZeroDivisionError
    loss.backward()


def resident() -> int:
    """Bytes of memory that the process has now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


#: Growth of the process over the last nine tenths of a soak: what allocators and caches may take, not a leak a step.
MAX_GROWTH = 16_000_000


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("steps", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_steps_of_everything_that_happens(steps: int) -> None:
    """Exceptions, evaluation, pauses, detaching, a second probe, inference in a thread, create_graph."""
    throws = Throws()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), throws, nn.Linear(5, 3))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    batch = data()
    expected = reference(model, batch)
    probe, second = CurvatureProbe(model), CurvatureProbe(model, layers="0")
    stop = threading.Event()
    twin_inputs = torch.randn(3, 4)

    failures = []

    def infer() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    model(twin_inputs)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=infer)
    recorded = before = 0
    for index in range(steps):
        if index == steps // 10:
            before = resident()
        kind = index % 10
        if kind in (3, 4, 5):
            throws.when = {3: "forward", 4: "backward", 5: ""}[kind]
            with pytest.raises((KeyError, ZeroDivisionError)):
                broken_step(model, batch, in_loss=kind == 5)
            throws.when = ""
            continue
        if kind == 6:
            with probe.paused():
                step(model, batch)
            continue
        if kind == 7:
            probe.detach()
            step(model, batch)
            probe.attach()
            continue
        if index == steps // 2:
            thread.start()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward(create_graph=kind == 8)
        recorded += 1
        if kind == 8:
            model.zero_grad()
        if kind == 9:
            model.eval()
            model(batch[0])
            model.train()
    stop.set()
    thread.join()
    growth = resident() - before
    print(f"{steps} steps: the process grew by {growth / 1e6:.1f} MB, bound {MAX_GROWTH / 1e6:.0f} MB")
    assert growth < MAX_GROWTH
    assert not failures
    assert probe.num_samples == 6 * recorded
    assert second.num_samples == 6 * (recorded + steps // 5)  # it was neither paused nor detached
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
    assert_all_close(second.fisher_diagonal().by_parameter(), expected)
    probe.detach()
    second.detach()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_create_graph_at_every_step_does_not_leak() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(60):
            F.cross_entropy(model(batch[0]), batch[1]).backward(create_graph=True)
            for p in model.parameters():
                p.grad = None
            if index in (10, 59):
                counts.append(tensors())
    assert counts[1] <= counts[0]
    assert probe.num_samples == 360


# ---- faults


@pytest.mark.parametrize(
    "place",
    [
        "begin",
        "end",
        "called",
        "_record",
        "_deliver",
        "_leave",
        *("prepare", "expected", "layouts", "receive", "finish"),
    ],
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_fault_in_any_hook_leaves_model_and_means_as_they_were(
    place: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may run out anywhere: the step fails, what was accumulated and what comes after is right."""
    model, batch = make(), data()
    expected = reference(model, batch)
    modules = list(model.modules())
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in modules]
    owner = Accumulation if place in ("prepare", "expected", "layouts", "receive", "finish") else Capture
    intact = getattr(owner, place)

    def fault(*_: Any) -> None:
        raise MemoryError(place)

    with CurvatureProbe(model) as probe:
        for index in range(1, 6):
            if index != at:
                step(model, batch)
                continue
            monkeypatch.setattr(owner, place, fault)
            with pytest.raises(MemoryError, match=place):
                step(model, batch)
            monkeypatch.setattr(owner, place, intact)
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        assert 24 <= probe.num_samples <= 30
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in modules] == before
    assert all(p._backward_hooks is None for p in model.parameters())


class Overflows(nn.Module):
    """Gradients that half precision does not hold become infinite."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda g: torch.where(g.abs() > torch.finfo(torch.float16).max, torch.inf, g))
        return x


def test_steps_that_a_grad_scaler_skips_are_counted() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 5), Overflows(), nn.Linear(5, 3)), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with CurvatureProbe(model, layers="0", loss_scale=scaler) as probe:
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
