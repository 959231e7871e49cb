"""The probe's life: accumulation, averages, every, pauses, checkpoints, and what is no training step."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning, InvalidArgumentError, ProbeStateError

from .reference import assert_all_close, assert_close, fisher_by_sample


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 4), torch.randint(3, (count,))


def step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()


def reference(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return fisher_by_sample(model, F.cross_entropy, *batch, len(batch[0]))


def test_training_loop_is_left_alone_and_batches_of_different_size_are_averaged_over_samples() -> None:
    model, plain = make(), None
    plain = copy.deepcopy(model)
    probe = CurvatureProbe(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    total, seen = {}, 0
    for count in (6, 3, 1):
        batch = data(count)
        for name, value in reference(model, batch).items():
            total[name] = total.get(name, 0) + value * count
        seen += count
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            step(m, batch)
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert probe.num_samples == seen
    assert_all_close(probe.fisher_diagonal().by_parameter(), {k: v / seen for k, v in total.items()})


def test_decay_is_a_bias_corrected_moving_average() -> None:
    model = make()
    probe = CurvatureProbe(model, decay=0.9)
    average, weight = {}, 0.0
    for count in (6, 3, 4):
        batch = data(count)
        step(model, batch)
        for name, value in reference(model, batch).items():
            average[name] = 0.9 * average.get(name, 0) + 0.1 * value
        weight = 0.9 * weight + 0.1
    assert_all_close(probe.fisher_diagonal().by_parameter(), {k: v / weight for k, v in average.items()})


def test_every_records_each_kth_forward_from_the_first() -> None:
    model = make()
    probe = CurvatureProbe(model, every=3)
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
    probe = CurvatureProbe(model)
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
    probe = CurvatureProbe(model)
    loss = F.cross_entropy(model(batch[0]), batch[1])
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    torch.autograd.grad(loss, [model[2].weight], retain_graph=True)
    assert probe.num_samples == 0
    loss.backward()
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_backward_with_create_graph_records_once_and_leaves_no_graph() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model)
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


def test_paused_reset_detach_attach() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model)
    with probe.paused():
        step(model, batch)
    assert probe.num_samples == 0
    step(model, batch)
    assert probe.num_samples == 6
    probe.detach()
    probe.detach()
    step(model, batch)
    assert probe.num_samples == 6
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    with pytest.raises(ProbeStateError, match="detached"), probe.paused():
        pass
    probe.attach()
    with pytest.raises(ProbeStateError, match="attached already"):
        probe.attach()
    probe.reset()
    assert probe.num_samples == 0
    step(model, batch)
    assert probe.num_samples == 6


def test_a_graph_recorded_before_detach_is_ignored_after_it() -> None:
    model, batch = make(), data()
    with CurvatureProbe(model) as probe:
        loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    assert probe.num_samples == 0


def test_selection() -> None:
    model = nn.ModuleDict({"encoder": make(), "head": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    assert CurvatureProbe(model).layer_names == ["encoder.0", "encoder.2", "head"]
    assert CurvatureProbe(model, layers="encoder.*").layer_names == ["encoder.0", "encoder.2"]
    assert CurvatureProbe(model, layers=["head", "encoder.0"]).layer_names == ["encoder.0", "head"]
    assert CurvatureProbe(model, nn.LayerNorm).layer_names == ["norm"]
    assert CurvatureProbe(model, (nn.Linear, nn.LayerNorm), layers="*").layer_names[-2:] == ["head", "norm"]
    assert CurvatureProbe(model, "all").layer_names == ["encoder.0", "encoder.2", "head", "norm"]


def test_subclasses_of_the_default_types_are_included() -> None:
    class Mine(nn.Linear):
        pass

    model, batch = nn.Sequential(Mine(4, 3)), data()
    probe = CurvatureProbe(model)
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_model_that_is_itself_a_layer() -> None:
    model, batch = nn.Linear(4, 3), data()
    probe = CurvatureProbe(model)
    step(model, batch)
    assert probe.layer_names == [""]
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_by_parameter_names_and_shapes() -> None:
    model = make()
    probe = CurvatureProbe(model)
    step(model, data())
    found = probe.fisher_diagonal()
    assert {k: v.shape for k, v in found.by_parameter().items()} == {k: v.shape for k, v in model.named_parameters()}
    assert torch.equal(found["0"], torch.cat([v.flatten() for v in list(found.by_parameter().values())[:2]]))
    copied = pickle.loads(pickle.dumps(found))
    assert_all_close(copied.by_parameter(), found.by_parameter(), 0.0)


def test_state_dict_survives_a_checkpoint() -> None:
    model = make()
    probe = CurvatureProbe(model)
    step(model, data())
    buffer = io.BytesIO()
    torch.save(probe.state_dict(), buffer)
    buffer.seek(0)
    resumed = CurvatureProbe(model)
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
    probe = CurvatureProbe(model)
    step(model, data())
    before = probe.fisher_diagonal()
    if other == "garbage":
        state = {"a": 1}
    elif other == "layers":
        state = CurvatureProbe(nn.Sequential(nn.Linear(4, 5))).state_dict()  # without layer 2
    elif other == "decay":
        state = CurvatureProbe(model, decay=0.5).state_dict()
    else:
        state = CurvatureProbe(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).state_dict()
    with pytest.raises(InvalidArgumentError):
        probe.load_state_dict(state)
    assert_all_close(probe.fisher_diagonal(), before, 0.0)


def test_layer_not_reached_by_the_loss_has_zeros() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.cut = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + self.cut(x).detach()

    model, batch = Model(), data()
    probe = CurvatureProbe(model)
    step(model, batch)
    found = probe.fisher_diagonal()
    assert found["unused"].abs().max() == found["cut"].abs().max() == 0
    assert_all_close(found.by_parameter(), reference(model, batch))


def test_module_used_twice_sums_over_its_uses_before_squaring() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(x[:, :2]) * torch.tanh(self.shared(x[:, 2:]))

    model, batch = Siamese(), data()
    probe = CurvatureProbe(model)
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_inplace_activation() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    batch = data()
    probe = CurvatureProbe(model)
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_frozen_layer_behind_a_trainable_one() -> None:
    model, batch = make(), data()
    model[2].requires_grad_(False)
    probe = CurvatureProbe(model)
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_frozen_layer_without_gradient_is_measured_by_the_module_around_it() -> None:
    model, batch = make(), data()
    model[0].requires_grad_(False)
    probe = CurvatureProbe(model)
    with pytest.warns(CurvatureWarning, match=r"\['0'\].*exact and slow"):
        step(model, batch)
    step(model, batch)  # warns once
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_two_forwards_in_one_backward_are_refused() -> None:
    model, (inputs, targets) = make(), data()
    probe = CurvatureProbe(model)
    loss = F.cross_entropy(model(inputs), targets) + F.cross_entropy(model(inputs * 2), targets)
    with pytest.raises(AttributionError, match="two forwards"):
        loss.backward()
    step(model, (inputs, targets))
    assert probe.num_samples == 6


def test_heads_in_separate_backwards_are_refused_not_zero() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    model, (inputs, targets) = Two(), data()
    CurvatureProbe(model)
    a, b = model(inputs)
    F.cross_entropy(a, targets).backward()
    with pytest.raises(AttributionError, match="second backward"):
        F.cross_entropy(b, targets).backward()


class Shared(nn.Module):
    """A layer sees one row for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.shift = nn.Linear(4, 3), nn.Linear(2, 3)
        self.condition = nn.Parameter(torch.randn(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x)) * self.shift(self.condition)


def test_a_row_that_all_samples_share_is_measured_by_the_module_around_it() -> None:
    model, batch = Shared(), data()
    probe = CurvatureProbe(model)
    with pytest.warns(CurvatureWarning, match="'shift'"):
        step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_a_row_that_all_samples_share_is_refused_where_the_model_returns_no_samples() -> None:
    class Loss(Shared):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(super().forward(x), t)

    model = Loss()
    CurvatureProbe(model, layers="shift")
    with pytest.warns(CurvatureWarning):
        loss = model(*data())
    with pytest.raises(AttributionError, match="'shift'"):
        loss.backward()


def test_error_in_the_middle_of_a_step_leaves_the_accumulators_right() -> None:
    class Fails(nn.Module):
        fail = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fail:
                raise ValueError("forward")
            return x

    failing = Fails()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), failing, nn.Linear(5, 3))
    batch = data()
    probe = CurvatureProbe(model)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    model, batch = make(), data()
    expected = reference(model, batch)
    model.to(dtype)
    probe = CurvatureProbe(model)
    step(model, (batch[0].to(dtype), batch[1]))
    found = probe.fisher_diagonal()
    assert {d.dtype for d in found.values()} == {torch.float32}
    assert_all_close(found.by_parameter(), expected, 5e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(4, 4), make()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, self.first(x), use_reentrant=use_reentrant)

    model, batch = Model(), data()
    expected = fisher_by_sample(nn.Sequential(model.first, *model.block), F.cross_entropy, *batch, 6)
    names = {"0": "first", "1": "block.0", "3": "block.2"}
    probe = CurvatureProbe(model)
    step(model, batch)
    found = probe.fisher_diagonal().by_parameter()
    for name, value in expected.items():
        index, kind = name.split(".")
        assert_close(found[f"{names[index]}.{kind}"], value)


def test_two_probes_on_one_model_do_not_see_each_other() -> None:
    model, batch = make(), data()
    first, second = CurvatureProbe(model), CurvatureProbe(model, layers="0")
    step(model, batch)
    first.hessian_diagonal(F.cross_entropy, *batch)
    second.fisher_diagonal(F.cross_entropy, *batch)
    assert first.num_samples == second.num_samples == 6
    second.detach()
    step(model, batch)
    assert (first.num_samples, second.num_samples) == (12, 6)
    assert_all_close(first.fisher_diagonal().by_parameter(), reference(model, batch))
