"""Training code that puts something around the model: it meets nothing of the probe's, and the numbers are right."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from secorder import CurvatureProbe

from ..helpers import Net, data, make, reference, seed
from ..reference import assert_all_close
from .loops import follow
from .twins import Loop, bit_for_bit, traces

Pair = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Pair], Tensor]


def outside(model: nn.Module, batch: Pair, **options: Any) -> Tensor:
    return F.cross_entropy(checkpoint(model, batch[0].requires_grad_(), **options), batch[1])


def with_loss(model: nn.Module, batch: Pair, **options: Any) -> Tensor:
    value: Tensor = checkpoint(
        lambda x, y: F.cross_entropy(model(x), y), batch[0].requires_grad_(), batch[1], **options
    )
    return value


def selective(model: nn.Module, batch: Pair) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return outside(model, batch, use_reentrant=False, context_fn=contexts)


def token(m: Any, x: Tensor) -> Tensor:
    """What belongs to the model itself is used beside its layers."""
    return m.b(torch.tanh(m.a(x) * m.get_parameter("gate")))


def gated() -> nn.Module:
    model = Net(token, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    model.register_parameter("gate", nn.Parameter(torch.randn(5)))
    return model


AROUND = {
    "model": partial(outside, use_reentrant=False),
    "model and loss": partial(with_loss, use_reentrant=False),
    "model, reentrant": partial(outside, use_reentrant=True),
    "model and loss, reentrant": partial(with_loss, use_reentrant=True),
    "selective": selective,
}


def training(loss: Loss) -> Loop:
    def loop(model: nn.Module) -> Any:
        for _ in range(3):
            model.zero_grad()
            value = loss(model, data())
            value.backward()
            yield value

    return loop


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("build", "options"), [(make, {"every": 2}), (gated, {"layer_types": "all"})])
def test_a_checkpoint_around_the_model(around: str, build: Callable[[], nn.Module], options: Any) -> None:
    loss = AROUND[around]
    model = build()
    before = traces(model)
    assert follow(model, [data() for _ in range(4)], loss, **options).exact
    assert traces(model) == before
    bit_for_bit(build, training(loss), **options)


def test_parametrizations_that_are_cached_around_the_model() -> None:
    def loss(model: nn.Module, batch: Pair) -> Tensor:
        with parametrize.cached():
            return F.cross_entropy(model(batch[0]), batch[1])

    def build() -> nn.Module:
        model = make()
        weight_norm(model[0])
        return model

    assert follow(build(), [data() for _ in range(3)], loss, layer_types="all").exact
    bit_for_bit(build, training(loss), layer_types="all")


@pytest.mark.parametrize("build", [make, gated])
def test_a_counter_of_operations_around_the_step(build: Callable[[], nn.Module]) -> None:
    model, (x, y) = build(), data()
    with FlopCounterMode(display=False) as plain:
        F.cross_entropy(model(x), y).backward()
    with CurvatureProbe(model, "all", reduction="mean") as probe, FlopCounterMode(display=False) as probed:
        F.cross_entropy(model(x), y).backward()
    assert probed.get_total_flops() == plain.get_total_flops()
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, (x, y)))


class Calls(TorchFunctionMode):
    """A user's, that computes otherwise, and counts the calls that it does so in."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if func is not torch.tanh:
            return value
        self.count += 1
        return 2 * value


def test_a_mode_that_computes_otherwise_around_the_forward() -> None:
    modes = []

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        modes.append(Calls())
        with modes[-1]:
            outputs = model(batch[0])
        return F.cross_entropy(outputs, batch[1])

    assert follow(make(), [data() for _ in range(3)], loss).exact
    assert {mode.count for mode in modes} == {1}


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_hook_of_the_users_that_detaches_the_probe(at: int) -> None:
    """Also where it is a pass of the library's own that runs it: steps one and two are looked at."""
    model, batch = make(), data()
    before = traces(model)
    probe = CurvatureProbe(model)
    steps: list[int] = []

    def detach(*_: Any) -> None:
        if len(steps) == at:
            probe.detach()

    handle = model[1].register_forward_hook(detach)
    for step in range(1, 5):
        steps.append(step)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    handle.remove()
    assert traces(model) == before
    assert (probe.attached, probe.num_batches) == (False, at - 1)


class Watches:
    """What users hang on layers: it keeps activations by name, means, and how often it was called."""

    def __init__(self) -> None:
        self.calls, self.shapes, self.mean = 0, defaultdict(list), torch.zeros(5)

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += 1
        self.shapes["all"].append(output.shape)
        self.mean += output.detach().mean(0)


def test_what_the_users_hooks_keep_is_of_the_users_forwards() -> None:
    seen = []
    for attached in (False, True):
        seed()
        model, watches, log, counts = make(), Watches(), [], {"calls": 0}
        everywhere: list[int] = []
        handle = register_module_forward_hook(lambda m, a, o, everywhere=everywhere: everywhere.append(1))
        model[0].register_forward_hook(watches.hook)
        model[1].register_forward_pre_hook(lambda m, a, log=log: log.append(1))
        model.register_forward_hook(lambda m, a, o, counts=counts: counts.update(calls=counts["calls"] + 1))
        probe = CurvatureProbe(model) if attached else None
        for _ in range(4):
            inputs, targets = data()
            F.cross_entropy(model(inputs), targets).backward()
        handle.remove()
        seen.append((watches.calls, dict(watches.shapes), watches.mean.tolist(), log, counts, everywhere))
        assert probe is None or probe.num_samples == 24
    assert seen[0] == seen[1]


@pytest.mark.parametrize("whole", [False, True])
def test_operations_are_counted_by_module_as_without_a_probe(whole: bool) -> None:
    seen = []
    for attached in (False, True):
        seed()
        model = Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
        probe = CurvatureProbe(model) if attached else None
        for _ in range(4):
            inputs, targets = data()
            with FlopCounterMode(display=False) as counter:
                loss = F.cross_entropy(model(inputs), targets)
                if whole:
                    loss.backward()
            seen.append({name: dict(counts) for name, counts in counter.get_flop_counts().items()})
            if not whole:
                loss.backward()
        assert probe is None or probe.num_samples == 24
    assert seen[:4] == seen[4:]
    assert {"Net", "Net.a", "Net.b"} <= seen[0].keys()


@pytest.mark.parametrize("where", ["inside", "around"])
def test_a_second_backward_through_a_checkpoint(where: str) -> None:
    """The layers save as many tensors as at first, though nothing is counted again."""
    inside = Net(
        lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)),
        a=nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        b=nn.Linear(5, 3),
    )
    model, batch = inside if where == "inside" else make(), data()
    before = traces(model)
    probe = CurvatureProbe(model, reduction="mean")
    attached = traces(model)
    loss = F.cross_entropy(model(batch[0]), batch[1]) if where == "inside" else AROUND["model and loss"](model, batch)
    loss.backward(retain_graph=True)
    loss.backward()
    assert traces(model) == attached
    probe.detach()
    assert traces(model) == before
    found = probe.fisher_diagonal().by_parameter()
    assert_all_close(found, {k: v for k, v in reference(model, batch).items() if k in found})
