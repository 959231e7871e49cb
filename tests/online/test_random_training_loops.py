"""Training loops built at random: bit for bit as without a probe, and the Fisher as a loop over samples tells it."""

import contextlib
import itertools
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning, SecorderError

from ..helpers import Net, seed
from ..reference import fisher_by_sample, relative_error
from .twins import same, seen_of, traces


class Step(NamedTuple):
    """One step of a loop."""

    size: int
    kind: str
    train: bool
    frozen: int  # index of a layer; -1 for none
    evaluate: bool  # between forward and backward
    zero: bool  # gradients before it, or accumulated


KINDS = (
    "plain", "plain", "plain", "forward fails", "backward fails", "no backward", "no grad", "paused", "reset",
    "retained", "autograd.grad", "create_graph", "checkpointed read", "detached",
)  # fmt: skip

STEPS = st.builds(
    Step,
    size=st.sampled_from([6, 6, 4, 2, 1, 0]),
    kind=st.sampled_from(KINDS),
    train=st.booleans(),
    frozen=st.sampled_from([-1, -1, -1, 0, 1, 2]),
    evaluate=st.booleans(),
    zero=st.booleans(),
)


class Trips(nn.Module):
    """Raises in the forward when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            raise KeyError("forward")
        return x


def build(shape: str, dropout: bool) -> nn.Module:
    seed()
    parts: dict[str, nn.Module] = {
        "a": nn.Linear(4, 5),
        "b": nn.Linear(5 if shape == "chain" else 4, 5),
        "c": nn.Linear(5, 3),
        "trips": Trips(),
        "drop": nn.Dropout(0.5 if dropout else 0.0),
    }
    functions: dict[str, Any] = {
        "chain": lambda m, x: m.c(m.trips(m.drop(torch.tanh(m.b(torch.tanh(m.a(x))))))),
        "branches": lambda m, x: m.c(m.trips(m.drop(torch.tanh(m.a(x)) * m.b(x)) + m.b(x * 2))),
    }
    return Net(functions[shape], **parts)


def layers_of(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


class Run:
    """One run of a loop, with or without probes."""

    def __init__(self, model: nn.Module, probes: list[CurvatureProbe]) -> None:
        self.model, self.probes = model, probes
        #: Batches that the first probe is to have seen, and the layer that was frozen.
        self.counted: list[tuple[Tensor, Tensor, str]] = []
        self.seen: list[Any] = []
        self.kept: list[Tensor] = []

    def step(self, step: Step, batch: tuple[Tensor, Tensor]) -> None:
        model = self.model
        model.train(step.train)
        for index, layer in enumerate(layers_of(model)):
            layer.requires_grad_(index != step.frozen)
        if step.zero:
            model.zero_grad()
        with contextlib.ExitStack() as stack:
            if step.kind == "paused":
                for probe in self.probes:
                    stack.enter_context(probe.paused())
            if step.kind == "no grad":
                stack.enter_context(torch.no_grad())
            if step.kind == "detached":
                for probe in self.probes:
                    probe.detach()
                    stack.callback(probe.attach)
            if step.kind == "reset":
                for probe in self.probes:
                    probe.reset()
                self.counted.clear()
            self.work(step, batch)
        if step.kind == "checkpointed read":
            for probe in self.probes:
                with contextlib.suppress(SecorderError):
                    probe.fisher_diagonal()

    def work(self, step: Step, batch: tuple[Tensor, Tensor]) -> None:
        model = self.model
        model.trips.armed = step.kind == "forward fails"
        try:
            output = model(batch[0])
        except KeyError:
            return
        finally:
            model.trips.armed = False
        loss = F.cross_entropy(output, batch[1], reduction="sum")
        self.seen.append(seen_of(model, output))
        if step.evaluate:
            model.eval()
            self.seen.append(model(batch[0][:2]).detach())
            model.train(step.train)
        if step.kind in ("no backward", "no grad"):
            self.kept = [output]
            return
        if step.kind == "autograd.grad":
            wanted = [p for p in model.parameters() if p.requires_grad]
            self.seen.append([g.clone() for g in torch.autograd.grad(loss, wanted)])
            return
        if step.kind == "backward fails":
            hook = output.register_hook(raises)
            with pytest.raises(KeyError):
                loss.backward()
            hook.remove()
            return
        loss.backward(retain_graph=step.kind == "retained", create_graph=step.kind == "create_graph")
        if step.kind == "retained":
            loss.backward()
        if step.kind == "create_graph":
            self.seen.append([None if p.grad is None else p.grad.detach().clone() for p in model.parameters()])
            for p in model.parameters():
                p.grad = None
        if step.kind not in ("paused", "detached"):
            self.counted.append((*batch, "abc "[step.frozen]))


def raises(_: Tensor) -> None:
    raise KeyError("backward")


@pytest.mark.filterwarnings("ignore:Using backward")
@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=1, max_size=6),
    shape=st.sampled_from(["chain", "branches"]),
    dropout=st.booleans(),
    two=st.booleans(),
    every=st.sampled_from([1, 1, 2]),
)
def test_random_loops(steps: list[Step], shape: str, dropout: bool, two: bool, every: int) -> None:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(7)
    batches = [
        (torch.randn(s.size, 4, generator=generator), torch.randint(3, (s.size,), generator=generator)) for s in steps
    ]
    runs = []
    for probed in (False, True):
        model = build(shape, dropout)
        before = traces(model)
        probes = [CurvatureProbe(model, reduction="sum", every=every)] if probed else []
        if probed and two:
            probes.append(CurvatureProbe(model, layers=["b", "c"], reduction="sum", decay=0.5))
        run = Run(model, probes)
        seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)
            for step, batch in zip(steps, batches, strict=True):
                run.step(step, batch)
                run.seen.append(seen_of(model, None))
        runs.append(run)
    plain, probed_run = runs
    assert len(plain.seen) == len(probed_run.seen)
    for one, other in zip(plain.seen, probed_run.seen, strict=True):
        assert same(one, other)
    check_fisher(probed_run, dropout, every)
    for probe in probed_run.probes:
        probe.detach()
    assert traces(probed_run.model) == before


def subsets(of: list[Any]) -> list[list[Any]]:
    return [list(some) for count in range(len(of) + 1) for some in itertools.combinations(of, count)]


def check_fisher(run: Run, dropout: bool, every: int) -> None:
    """Of each layer: the mean over the samples that it says it has seen, or a refusal.

    A batch of one is left out until another one has told where samples are. Each batch that finds a layer frozen, with
    nothing trainable before it, may be left out of that layer: training's own backward does not reach it there, but a
    verification batch may.
    """
    probe = run.probes[0]
    counted = [batch for batch in run.counted if len(batch[0])]
    if dropout or every > 1:
        return
    try:
        found = probe.fisher_diagonal(missing="skip").by_parameter()
    except SecorderError:
        return
    run.model.eval()
    whole = [(len(t), f, fisher_by_sample(run.model, F.cross_entropy, x, t, len(t))) for x, t, f in counted]
    late = [one for index, one in enumerate(whole) if one[0] > 1 or any(c > 1 for c, _, _ in whole[:index])]
    assert probe.num_samples in (sum(c for c, _, _ in whole), sum(c for c, _, _ in late))
    for name, value in found.items():
        errors = []
        for taken in (whole, late):
            surely = [one for one in taken if one[1] != name[0]]
            for part in subsets([one for one in taken if one[1] == name[0]]):
                total = sum(count for count, _, _ in surely + part)
                if total:
                    expected = sum(count * one[name] for count, _, one in surely + part) / total
                    errors.append(relative_error(value, expected))
        assert min(errors) < 1e-9, (name, errors)
