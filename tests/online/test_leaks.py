"""Nothing is kept alive: tensors that live are as many after many steps, looks, failures and deletions as before."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe

from ..helpers import Net, data, mlp, step
from .test_host_reads import KINDS

pytestmark = pytest.mark.filterwarnings("ignore::secorder.CurvatureWarning", "ignore:Using backward")


def branches() -> Net:
    parts = {"a": nn.Linear(4, 5), "b": nn.Linear(4, 5), "head": nn.Linear(5, 3)}
    return Net(lambda m, x: m.head(torch.tanh(m.a(x)) * m.b(x) + m.b(x)), **parts)


def shared_row() -> Net:
    """The model runs again at each step for one of its layers."""
    net = Net(lambda m, x: torch.tanh(m.fc(x)) * m.shift(m.row), fc=nn.Linear(4, 3), shift=nn.Linear(2, 3))
    net.row = nn.Parameter(torch.randn(1, 2))
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {"chain": mlp, "branches": branches, "shared row": shared_row}


def alive() -> int:
    """Tensors that live, as far as Python has seen them."""
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


class Watched:
    """The tensors of a model's forwards, watched: who dies, and who does not."""

    def __init__(self, model: nn.Module) -> None:
        self.living: list[Any] = []
        self.handles = [m.register_forward_hook(self.saw) for m in model.modules()]

    def saw(self, module: nn.Module, args: Any, output: Any) -> None:
        self.living += [weakref.ref(t) for t in (*args, output) if isinstance(t, Tensor)]

    def left(self, *kept: Tensor) -> int:
        """How many live that nobody keeps."""
        gc.collect()
        known = {id(t) for t in kept}
        return sum(ref() is not None and id(ref()) not in known for ref in self.living)

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def fails(*_: Any) -> None:
    raise KeyError


def forward_fails(model: nn.Module, batch: Any) -> None:
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    handle = last.register_forward_hook(fails)
    with pytest.raises(KeyError):
        model(batch[0])
    handle.remove()


def backward_fails(model: nn.Module, batch: Any) -> None:
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    handle = last.weight.register_hook(fails)
    with pytest.raises(KeyError):
        step(model, batch)
    handle.remove()


def with_graph(model: nn.Module, batch: Any) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward(create_graph=True)
    model.zero_grad()


def second_backward(model: nn.Module, batch: Any) -> None:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward(retain_graph=True)
    loss.backward()


def by_grad(model: nn.Module, batch: Any) -> None:
    torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))


WORK: dict[str, Callable[[nn.Module, Any], Any]] = {
    "steps": step,
    "no backward": lambda m, b: m(b[0]).sum(),
    "forward fails": forward_fails,
    "backward fails": backward_fails,
    "create_graph": with_graph,
    "second backward": second_backward,
    "autograd.grad": by_grad,
    "bad": lambda m, b: step(m, (b[0] * float("nan"), b[1])),
    "two forwards": lambda m, b: (F.cross_entropy(m(b[0]), b[1]) + F.cross_entropy(m(b[0][:3]), b[1][:3])).backward(),
    "evaluation": lambda m, b: m.eval()(b[0]).sum() if not m.train() else m(b[0]).sum().backward(),
}


#: PyTorch holds on to the graph of the latest backward that was broken off, with or without a probe.
KEPT_BY_PYTORCH = {"backward fails"}


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", MODELS)
def test_live_tensors_are_constant(name: str, work: str, looks: bool) -> None:
    model, batch = MODELS[name](), data()
    counts = []
    with CurvatureProbe(model, layers="*") as probe:
        for index in range(12):
            WORK[work](model, batch)
            model.zero_grad()
            if looks:
                probe._attributions.forget()  # the next batch is looked at
            if index in (5, 11):
                counts.append(alive())
        watched = Watched(model)
        for _ in range(2):
            WORK[work](model, batch)
            if looks:
                probe._attributions.forget()
        watched.stop()
        model.zero_grad()
        left = watched.left(*batch, *model.parameters(), *model.buffers())
    assert counts[0] == counts[1]
    assert left == 0 or work in KEPT_BY_PYTORCH


@pytest.mark.parametrize("kind", KINDS)
def test_looks_keep_nothing(kind: str) -> None:
    build, inputs_of, classes = KINDS[kind]
    model, inputs, targets = build(), inputs_of(), torch.randint(classes, (6,))
    watched = Watched(model)
    with CurvatureProbe(model, "all") as probe:
        for _ in range(3):
            probe._attributions.forget()
            step(model, (inputs, targets))
        model.zero_grad()
        watched.stop()
        assert watched.left(inputs, targets, *model.parameters(), *model.buffers()) == 0


@pytest.mark.parametrize("work", sorted(WORK.keys() - KEPT_BY_PYTORCH))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("detached", [True, False])
def test_a_model_and_its_probe_die_with_their_names(name: str, work: str, detached: bool) -> None:
    model, batch = MODELS[name](), data()
    before = alive()
    probe = CurvatureProbe(model, layers="*")
    for _ in range(3):
        WORK[work](model, batch)
    model.zero_grad()
    if detached:
        probe.detach()
    parts = [weakref.ref(o) for o in (model, probe, probe._fisher, *model.modules(), *model.parameters())]
    del model, probe
    gc.collect()
    assert not any(ref() is not None for ref in parts)
    assert alive() <= before


def test_a_probe_dies_while_its_model_lives() -> None:
    model, batch = branches(), data()
    step(model, batch)
    model.zero_grad()
    before = alive()
    probe = CurvatureProbe(model)
    loss = F.cross_entropy(model(batch[0]), batch[1])
    probe.detach()
    dead = weakref.ref(probe._fisher)
    del probe
    loss.backward()
    del loss
    model.zero_grad()
    gc.collect()
    assert dead() is None
    assert alive() == before


def test_steps_leave_no_reference_cycles() -> None:
    """What a step made goes with it: nothing waits for the garbage collector, which would stop training for it."""
    model = mlp()
    with CurvatureProbe(model):
        for _ in range(3):
            step(model, data())
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                model.zero_grad()
                step(model, data())
            kinds = {type(o).__name__ for o in gc.get_objects()}
        finally:
            gc.enable()
    assert not {"ForwardRecord", "Backward", "Audit"} & kinds
