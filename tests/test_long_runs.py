"""What long runs meet: overflow, loss scaling, compilation, interruption, threads, exceptions."""

import gc
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online import backward, capture, closing, delivery, waiting
from secorder.online.attributions import Attributions
from secorder.online.hooks import Attachment

from .helpers import data, make, reference, step
from .reference import assert_all_close


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
    """Bytes of memory that the process has now, but for those of libraries, whose pages come and go."""
    gc.collect()
    _, pages, of_libraries, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (pages - of_libraries) * os.sysconf("SC_PAGE_SIZE")


#: Growth of the process over the last nine tenths of a soak: what allocators and caches may take, not a leak a step.
MAX_GROWTH = 16_000_000


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("steps", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_steps_of_everything_that_happens(steps: int) -> None:
    """Exceptions, evaluation, pauses, detaching, a second probe, inference in a thread, create_graph."""
    throws = Throws()
    model = make(nn.Tanh(), throws)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    batch = data()
    expected = reference(model, batch)
    probe, second = CurvatureProbe(model, reduction="mean"), CurvatureProbe(model, layers="0", reduction="mean")
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
            if index in (40, 59):  # what audits are compared in is made in the 33rd
                counts.append(tensors())
    assert counts[1] <= counts[0]
    assert probe.num_samples == 360


PLACES: dict[str, Any] = {
    "begin": Attachment,
    "end": Attachment,
    "register": Attachment,
    "scheduled": Attributions,
    "verify": Attributions,
    "deliver": delivery,
    "_gradients": delivery,
    "wait": delivery,
    "add_waiting": closing,
    "_add": waiting,
    "bring_rank_one": capture,
    "_watch": backward,
    "close": backward,
    "_is_complete": closing,
    "_close": closing,
    "_audit": closing,
}


class Tokens(nn.Module):
    """Layers with several positions of each sample, which do not wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.stack([x, 2 * x], 1)).mean(1)


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.filterwarnings("ignore::secorder.CurvatureWarning")
def test_a_fault_in_any_hook_stops_no_training_and_leaves_means_as_they_were(
    place: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may run out anywhere: the step goes on, what was accumulated and what comes after is right."""
    model, batch = Tokens() if place in {"deliver", "_gradients"} else make(), data()
    expected = reference(model, batch)
    modules = list(model.modules())
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in modules]
    intact, faults = getattr(PLACES[place], place), 0
    gradients: list[Tensor] = []

    def fault(*_: Any, **__: Any) -> None:
        nonlocal faults
        faults += 1
        raise MemoryError(place)

    with CurvatureProbe(model) as probe:
        for index in range(1, 6):
            model.zero_grad()
            if index == at:
                monkeypatch.setattr(PLACES[place], place, fault)
            step(model, batch)
            monkeypatch.setattr(PLACES[place], place, intact)
            gradients = gradients or [p.grad.clone() for p in model.parameters()]
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
        assert faults or (place == "verify" and at > 1)  # the structure of this model leaves no doubt after the first
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        assert 24 <= probe.num_samples <= 30
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in modules] == before
    assert not any(p._backward_hooks for p in model.parameters())


def test_strict_lets_a_fault_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(), data()

    def fault(*_: Any, **__: Any) -> None:
        raise MemoryError("wait")

    monkeypatch.setattr(delivery, "wait", fault)
    with CurvatureProbe(model, strict=True), pytest.raises(MemoryError, match="wait"):
        step(model, batch)
