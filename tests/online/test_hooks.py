"""The hooks: what counts as a recorded backward, what is refused, what they leave behind."""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CurvatureProbe, CurvatureWarning, ProbeStateError

from ..helpers import Net, data, make, reference, step
from ..reference import assert_all_close, assert_close, fisher_by_sample


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


def test_every_records_each_kth_forward_from_the_first() -> None:
    model = make()
    probe = CurvatureProbe(model, every=3, reduction="mean")
    batches = [data() for _ in range(5)]
    for batch in batches:
        with torch.no_grad():
            model(batch[0])  # neither recorded nor counted
        step(model, batch)
    assert probe.num_samples == 12
    first, fourth = reference(model, batches[0]), reference(model, batches[3])
    expected = {name: (first[name] + fourth[name]) / 2 for name in first}
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


@pytest.mark.parametrize("again", ["backward", "grad"])
def test_a_second_backward_of_one_graph_counts_once(again: str) -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward(retain_graph=True)
    if again == "backward":
        loss.backward()
    else:
        torch.autograd.grad(loss, list(model.parameters()))
    assert probe.num_samples == 6
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_autograd_grad_is_no_training_step() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    loss = F.cross_entropy(model(batch[0]), batch[1])
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    torch.autograd.grad(loss, [model[2].weight], retain_graph=True)
    assert probe.num_samples == 0
    loss.backward()
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_backward_with_create_graph_records_once_and_leaves_no_graph() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    expected = reference(model, batch)
    F.cross_entropy(model(batch[0]), batch[1]).backward(create_graph=True)
    found = probe.fisher_diagonal()
    assert not any(d.requires_grad for d in found.values())
    assert_all_close(found.by_parameter(), expected)


def test_forward_without_backward_records_nothing_and_holds_no_memory() -> None:
    model = make()
    probe = CurvatureProbe(model)
    inputs = torch.randn(6, 4)
    kept = []
    model[0].register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))
    with torch.no_grad():
        model(inputs)
    model.eval()
    model(inputs)
    gc.collect()
    assert len(kept) >= 2
    assert all(ref() is None for ref in kept)
    assert probe.num_samples == 0
    with pytest.raises(ProbeStateError, match="nothing is accumulated"):
        probe.fisher_diagonal()


def test_a_graph_recorded_before_detach_is_ignored_after_it() -> None:
    model, batch = make(), data()
    with CurvatureProbe(model) as probe:
        loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    assert probe.num_samples == 0


def test_module_used_twice_sums_over_its_uses_before_squaring() -> None:
    siamese = Net(lambda m, x: m.shared(x[:, :2]) * torch.tanh(m.shared(x[:, 2:])), shared=nn.Linear(2, 3))
    model, batch = siamese, data()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_inplace_activation() -> None:
    model, batch = make(nn.ReLU(inplace=True)), data()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_frozen_layer_behind_a_trainable_one() -> None:
    model, batch = make(), data()
    model[2].requires_grad_(False)
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_two_forwards_in_one_backward_are_refused_where_it_is_not_told_what_a_sample_is() -> None:
    model, (inputs, targets) = make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    loss = F.cross_entropy(model(inputs), targets) + F.cross_entropy(model(inputs * 2), targets)
    with pytest.warns(CurvatureWarning, match="several forwards"):
        loss.backward()
    with pytest.raises(AttributionError, match="forwards="):
        probe.fisher_diagonal()
    probe.reset()
    step(model, (inputs, targets))
    assert probe.num_samples == 6
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, (inputs, targets)))


def test_heads_in_separate_backwards_are_refused_not_zero() -> None:
    heads = {name: nn.Linear(4, 3) for name in "ab"}
    model, (inputs, targets) = Net(lambda m, x: (m.a(x), m.b(x)), **heads), data()
    probe = CurvatureProbe(model, reduction="mean")
    a, b = model(inputs)
    F.cross_entropy(a, targets).backward()
    with pytest.warns(CurvatureWarning, match="second backward"):
        F.cross_entropy(b, targets).backward()
    with pytest.raises(AttributionError, match="second backward"):
        probe.fisher_diagonal()
    assert probe.fisher_diagonal(missing="skip").keys() == {"a"}


def test_error_in_the_middle_of_a_step_leaves_the_accumulators_right() -> None:
    class Fails(nn.Module):
        fail = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fail:
                raise ValueError("forward")
            return x

    failing = Fails()
    model, batch = make(nn.Tanh(), failing), data()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    failing.fail = True
    with pytest.raises(ValueError, match="forward"):
        step(model, batch)
    failing.fail = False

    def stop(g: torch.Tensor) -> None:
        raise ValueError("backward")

    out = model[0](batch[0])
    hidden = model(batch[0])
    hidden.register_hook(stop)
    with pytest.raises(ValueError, match="backward"):
        F.cross_entropy(hidden, batch[1]).backward()
    del out
    step(model, batch)
    assert probe.num_samples == 12
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(m.block, m.first(x), use_reentrant=use_reentrant)

    model, batch = Net(forward, first=nn.Linear(4, 4), block=make()), data()
    expected = fisher_by_sample(nn.Sequential(model.first, *model.block), F.cross_entropy, *batch, 6)
    names = {"0": "first", "1": "block.0", "3": "block.2"}
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    found = probe.fisher_diagonal().by_parameter()
    for name, value in expected.items():
        index, kind = name.split(".")
        assert_close(found[f"{names[index]}.{kind}"], value)


class OneThreads(dict[int, Any]):
    """Records by thread, as one thread may ask for them: others add and remove theirs while one walks over all."""

    def __iter__(self) -> Any:
        raise RuntimeError("dictionary changed size during iteration")

    values = items = __iter__


def test_a_forward_asks_for_no_record_of_another_thread() -> None:
    model, batch = make(), data()
    with CurvatureProbe(model) as probe:
        probe._attachment.running = OneThreads()
        step(model, batch)
        with torch.no_grad():
            model(batch[0])
        assert probe.num_samples == 6
        probe._attachment.running = {}


@pytest.mark.filterwarnings("error::secorder.CurvatureWarning")  # of samples that are not found, nothing is recorded
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layers", [["a", "b.0", "c"], "all"])
@pytest.mark.parametrize("how", ["paused", "detached"])
def test_a_checkpoint_whose_backward_is_not_recorded_saves_as_many_tensors(
    how: str, layers: Any, reentrant: bool
) -> None:
    """Else it stops training, since what it computes again is not what it computed."""

    def forward(m: Any, x: Any) -> Any:
        return m.c(checkpoint(m.b, torch.tanh(m.a(x)), use_reentrant=reentrant))

    b = nn.Sequential(nn.Linear(5, 5), nn.Unflatten(1, (1, 5)), nn.MultiheadAttention(5, 1, batch_first=True))
    b[2].forward = lambda x, f=b[2].forward: f(x, x, x)[0][:, 0]
    model, (inputs, targets) = Net(forward, a=nn.Linear(4, 5), b=b, c=nn.Linear(5, 3)), data()
    F.cross_entropy(model(inputs), targets).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    probe = CurvatureProbe(model, layers=layers) if layers != "all" else CurvatureProbe(model, "all")
    loss = F.cross_entropy(model(inputs), targets)
    if how == "paused":
        with probe.paused():
            loss.backward()
    else:
        probe.detach()
        loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
    probe.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class CallsItself(nn.Module):
    """Its own answer, taken in some state, is a part of what it computes."""

    def __init__(self, around: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.body, self.head, self.around = nn.Linear(4, 5), nn.Linear(5, 3), around

    def forward(self, x: Tensor, inner: bool = False) -> Tensor:
        answer = self.head(torch.tanh(self.body(x)))
        if inner:
            return answer
        with self.around():
            other = self(x.detach(), inner=True)
        return answer * (2 + other.detach().tanh())


@pytest.mark.parametrize("around", [torch.no_grad, nullcontext])
def test_a_model_that_calls_itself_ends_once(around: Callable[[], AbstractContextManager[object]]) -> None:
    """Whatever keeps the inner call from being recorded, the outer one's hooks stay until it has ended itself."""
    model, batch = CallsItself(around), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(3):
            step(model, batch)
            assert not any(module._forward_hooks for module in model.children())
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    assert probe.num_samples == 18


def test_frozen_parts_are_not_gone_through_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4).requires_grad_(False) for _ in range(20)], nn.Linear(4, 3))
    asked: list[str] = []

    def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        asked.append(type(module).__name__)
        return iter(())

    with CurvatureProbe(model, reduction="mean") as probe:
        for number in range(7):
            with monkeypatch.context() as patch:
                if number in (4, 5, 6):  # of which none is looked at
                    patch.setattr(nn.Module, "named_parameters", named_parameters)
                model(torch.randn(5, 4)).square().sum(1).mean().backward()
        assert probe.num_samples == 35
    assert not asked
