"""A record a forward: whatever else happens meanwhile, each forward's samples are counted by its own backward."""

import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, ProbeStateError
from secorder.online.audit.directions import Directions
from secorder.online.audit.freivalds import Audit
from secorder.online.record import Backward, Backwards

from ..helpers import Net, data, make, mlp, reference, step
from ..reference import assert_all_close
from .twins import bit_for_bit, traces


def mean_of(*found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def branches() -> Net:
    parts = {"a": nn.Linear(4, 5), "b": nn.Linear(4, 5), "norm": nn.LayerNorm(5), "head": nn.Linear(5, 3)}
    return Net(lambda m, x: m.head(m.norm(torch.tanh(m.a(x)) * m.b(x)) + m.b(x)), **parts)


MODELS = {"chain": mlp, "branches": branches}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", [6, 3, 1])
def test_an_eval_forward_between_forward_and_backward(model: nn.Module, grad: bool, size: int) -> None:
    first, other = data(), data(size)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        loss = loss_of(model, first)
        model.eval()
        with torch.set_grad_enabled(grad):
            model(other[0])
        model.train()
        loss.backward()
        assert probe.num_samples == 6
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, first))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("sizes", [(6, 6, 6), (6, 4, 3)])
def test_forwards_in_flight_are_counted_by_their_own_backwards(
    model: nn.Module, order: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    batches = [data(size) for size in sizes]
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        losses = [loss_of(model, batch) for batch in batches]
        for index in order:
            losses[index].backward()
        assert probe.num_samples == sum(sizes)
        weighted = [{n: f * len(b[0]) for n, f in reference(model, b).items()} for b in batches]
        expected = {n: f * 3 / sum(sizes) for n, f in mean_of(*weighted).items()}
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


def test_a_backward_that_never_comes_is_nothing(model: nn.Module) -> None:
    kept, batch = [], data()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        kept.append(loss_of(model, data()))
        loss_of(model, data())
        step(model, batch)
        torch.autograd.grad(kept[0], list(model.parameters()), retain_graph=True)
        assert probe.num_samples == 6
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


@pytest.mark.parametrize("retained", [False, True])
def test_the_same_loss_backward_again(model: nn.Module, retained: bool) -> None:
    batch = data()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        loss = loss_of(model, batch)
        loss.backward(retain_graph=True)
        step(model, batch)  # another forward in between
        loss.backward(retain_graph=retained)
        assert probe.num_samples == 12
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_another_loss_through_the_same_forward_is_refused_when_read(model: nn.Module) -> None:
    (inputs, targets), others = data(), torch.randint(3, (6,))
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        output = model(inputs)
        F.cross_entropy(output, targets).backward(retain_graph=True)
        (F.cross_entropy(output, others) * 2).backward()
        with pytest.raises(AttributionError, match="second backward"):
            probe.fisher_diagonal()
        probe.reset()
        step(model, (inputs, targets))
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, (inputs, targets)))


class Breaks(nn.Module):
    """Raises an exception half-way in forward, or in backward where its output's gradient comes."""

    def __init__(self, kind: type[BaseException] = ValueError) -> None:
        super().__init__()
        self.where, self.kind = "", kind

    def fail(self, *_: Any) -> None:
        raise self.kind("half-way")

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            self.fail()
        if self.where == "backward":
            x = x * 1
            x.register_hook(self.fail)
        return x


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("first", [True, False])
def test_what_breaks_off_half_way_leaves_the_numbers_right(where: str, kind: type[BaseException], first: bool) -> None:
    """The layers that had their gradient are counted, each by itself, and the others are not."""
    breaks, whole, broken = Breaks(kind), data(), data(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), breaks, nn.Linear(5, 3))
    before = traces(model)
    with CurvatureProbe(model, reduction="mean") as probe:
        if not first:
            step(model, whole)
        breaks.where = where if where == "forward" else ""
        # In backward, by a hook on a parameter: looks for samples do not run it.
        handle = model[3].weight.register_hook(breaks.fail) if where == "backward" else None
        with pytest.raises(kind, match="half-way"):
            step(model, broken)
        breaks.where = ""
        if handle is not None:
            handle.remove()
        if first:
            step(model, whole)
        step(model, whole)
        found, expected = probe.fisher_diagonal().by_parameter(), reference(model, whole)
        steps = 2
        if where == "backward":
            late = {n: (f * 6 * steps + reference(model, broken)[n] * 5) / (6 * steps + 5) for n, f in expected.items()}
            expected = {n: late[n] if n.startswith("3") else f for n, f in expected.items()}
        assert_all_close(found, expected)
    assert traces(model) == before


def test_a_broken_backward_leaves_nothing_on_the_parameters_at_the_next_forward() -> None:
    breaks = Breaks()
    model = nn.Sequential(nn.Linear(4, 5), breaks, nn.Linear(5, 3))
    before = traces(model)
    probe = CurvatureProbe(model)
    step(model, data())
    attached = traces(model)
    breaks.where = "backward"
    with pytest.raises(ValueError, match="half-way"):
        step(model, data())
    breaks.where = ""
    with torch.no_grad():
        model(data()[0])
    assert traces(model) == attached
    probe.detach()
    assert traces(model) == before


def test_detaching_after_a_broken_pass_leaves_no_trace() -> None:
    for where in ("forward", "backward"):
        breaks = Breaks()
        model = nn.Sequential(nn.Linear(4, 5), breaks, nn.Linear(5, 3))
        before = traces(model)
        probe = CurvatureProbe(model)
        breaks.where = where
        with pytest.raises(ValueError, match="half-way"):
            step(model, data())
        probe.detach()
        assert traces(model) == before


def test_an_interrupt_in_the_forward_of_a_layer() -> None:
    """Raised where no forward hook with always_call runs for it: the layer's own hooks must go all the same."""
    model, batch = branches(), data()
    interrupt = model.b.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = traces(model)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        with pytest.raises(KeyboardInterrupt):
            model(batch[0])
        interrupt.remove()
        step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    before["hooks"]["b"] = {}
    assert traces(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_forwards_of_several_threads(name: str) -> None:
    """Each thread trains the same model on batches of its own, at the same time."""
    model, batches = MODELS[name](), [data(size) for size in (3, 4, 5, 6)]
    failures: list[BaseException] = []
    start = threading.Barrier(len(batches))

    def work(batch: tuple[Tensor, Tensor]) -> None:
        try:
            start.wait()
            for _ in range(25):
                loss_of(model, batch).backward()
        except BaseException as error:
            failures.append(error)

    with CurvatureProbe(model, "all", reduction="mean") as probe:
        step(model, batches[0])
        probe.reset()
        threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        found = probe.fisher_diagonal().by_parameter()
    expected = {
        n: sum(25 * len(b[0]) * reference(model, b)[n] for b in batches) / (25 * 18)
        for n in reference(model, batches[0])
    }
    assert probe.num_samples == 25 * 18
    assert_all_close(found, expected)
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    for batch in batches:
        for _ in range(25):
            loss_of(model, batch).backward()
    step(model, batches[0])
    for grad, p in zip(grads, model.parameters(), strict=True):
        assert torch.allclose(grad, p.grad)  # in whatever order they were added


def test_the_model_is_not_looked_at_while_another_thread_runs_a_backward() -> None:
    """A look takes the hooks off parameters: those of the audit, and the user's own."""
    model, batch, seen, armed = branches(), data(), [], False
    model.a.weight.register_hook(lambda _: seen.append(1))

    def in_another_thread(*_: Any) -> None:
        if not armed:
            return

        def forwards() -> None:
            for _ in range(3):  # the first of which is to be looked at
                model(data(4)[0])

        thread = threading.Thread(target=forwards)
        thread.start()
        thread.join()

    with CurvatureProbe(model, "all", reduction="mean") as probe:
        hook = model.head.register_full_backward_pre_hook(in_another_thread)
        for _ in range(2):
            step(model, batch)
        armed = True
        model.zero_grad()
        with mock.patch.object(probe._attributions, "verify", side_effect=AssertionError("looked at")) as look:
            step(model, batch)
        hook.remove()
        look.assert_not_called()
        assert seen == [1, 1, 1]
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


@pytest.mark.parametrize("stays", [False, True])
def test_a_look_waits_for_a_thread_that_serves_the_model(stays: bool) -> None:
    """Unless that one does not end; then the next batch is looked at."""
    model, batch, within, leave = branches(), data(), threading.Event(), threading.Event()

    def busy(*_: Any) -> None:
        if threading.current_thread() is thread:
            within.set()
            leave.wait(10)

    def serve() -> None:
        with torch.no_grad():
            model(batch[0])

    thread = threading.Thread(target=serve)
    hook = model.head.register_forward_hook(busy)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        probe._attachment._patience = 0.1 if stays else 10.0
        thread.start()
        within.wait()
        with mock.patch("time.sleep", side_effect=None if stays else lambda _: leave.set()):
            step(model, batch)
        assert probe.num_samples == (0 if stays else len(batch[0]))
        if stays:
            with pytest.raises(ProbeStateError, match="let them wait"):
                probe.fisher_diagonal()
        leave.set()
        thread.join()
        hook.remove()
        step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_backward_passes_that_begin_at_once_see_each_other() -> None:
    """Neither is alone, so that what the other brings into ``.grad`` is not held against it."""

    class AtOnce(Backwards):
        def values(self) -> Any:
            both.wait()
            return super().values()

    both, running = threading.Barrier(2, timeout=10), AtOnce()
    passes = [Backward(number, Audit(Directions())) for number in (1, 2)]
    threads = [threading.Thread(target=running.begin, args=(one,)) for one in passes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.alone for one in passes] == [False, False]


def test_a_backward_that_ends_is_seen_until_its_hooks_are_gone() -> None:
    running, leaf, seen = Backwards(), torch.zeros(2, requires_grad=True), []
    ends, begins = (Backward(number, Audit(Directions())) for number in (1, 2))
    running.begin(ends)
    ends.on_gradient(leaf, lambda _: None)

    class Removed:
        def remove(self) -> None:
            running.begin(begins)  # as by another thread
            seen.append(len(leaf._backward_hooks))

    ends.handles.insert(0, Removed())
    running.end(ends)
    assert seen == [1]
    assert not begins.alone
    assert not leaf._backward_hooks
    assert list(running) == [2]


def test_a_backward_in_another_thread_than_the_forward(model: nn.Module) -> None:
    batch = data()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        loss = loss_of(model, batch)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_everything_in_turn_is_bit_for_bit_as_without_a_probe() -> None:
    def loop(m: nn.Module) -> Iterator[Any]:
        first, second = data(), data(4)
        kept = loss_of(m, first)
        m.eval()
        yield m(second[0])
        m.train()
        with torch.no_grad():
            yield m(second[0])
        loss_of(m, second).backward()
        yield kept
        kept.backward(retain_graph=True)
        yield torch.autograd.grad(kept, list(m.parameters()))
        loss_of(m, first).backward(create_graph=True)
        yield None

    probe = bit_for_bit(branches, loop, layer_types="all")
    assert probe.num_samples == 16


def test_nothing_is_told_of_a_forward_that_was_recorded_before_reset_or_detach() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        before = loss_of(model, batch)
        probe.detach()
        probe.attach()
        before.backward()
        with pytest.raises(ProbeStateError):
            probe.fisher_diagonal()
        before = loss_of(model, batch)
        probe.reset()
        before.backward()  # its samples came after reset
        assert probe.num_samples == 6
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_a_model_that_is_called_within_its_own_backward() -> None:
    """A hook on the output that runs the model, such as for a metric, is no part of the forward on its way."""
    model, batch = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        output = model(batch[0])
        output.register_hook(lambda g: model(batch[0][:2]).sum() * 0 + g)
        F.cross_entropy(output, batch[1]).backward()
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
