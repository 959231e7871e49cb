"""The user's model is a guest: bit for bit as without us, and no trace after."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import (
    CurvatureProbe,
    CurvatureWarning,
    NonFiniteError,
    SecorderError,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)

from .helpers import Label


class Model(nn.Module):
    """Convolution, batch normalisation with running statistics, dropout, a frozen layer, a buffer, spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(32, 4).requires_grad_(False)
        self.head = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1)
        if self.fail:
            raise ValueError("half-way")
        return self.head(torch.tanh(self.frozen(hidden)))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 1, 6, 6), torch.randint(3, (5,))


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "identities": {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "flags": {k: (p.requires_grad, p.is_leaf) for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "hooks": {
            k: [len(getattr(m, h)) for h in vars(m) if h.endswith("_hooks") or "_hooks_" in h]
            for k, m in model.named_modules()
        },
        "attributes": {k: sorted(vars(m)) for k, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def assert_same(before: Any, after: Any) -> None:
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert list(before) == list(after)
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


ONE_SHOT: dict[str, Callable[..., Any]] = {
    "hessian": per_layer_hessian_diagonal,
    "hutchinson": lambda *a, **k: per_layer_hessian_diagonal(*a, method="hutchinson", num_draws=2, **k),
    "create_graph": lambda *a, **k: per_layer_hessian_diagonal(*a, create_graph=True, **k),
    "fisher": per_layer_fisher_diagonal,
    "type-2": lambda *a, **k: per_layer_fisher_diagonal(*a, fisher_type="type-2", **k),
    "mc": lambda *a, **k: per_layer_fisher_diagonal(*a, fisher_type="mc", **k),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("call", ONE_SHOT)
def test_one_shot_calls_leave_everything_as_they_found_it(call: str, train: bool) -> None:
    model, (inputs, targets) = Model().train(train), data()
    F.cross_entropy(model(inputs), targets).backward()
    before = snapshot(model)
    try:
        ONE_SHOT[call](model, F.cross_entropy, inputs, targets)
    except SecorderError:
        assert train  # per-sample gradients do not exist under batch statistics
        assert "fisher" in call or call in ("type-2", "mc")
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("call", ONE_SHOT)
def test_one_shot_calls_restore_everything_when_the_model_raises(call: str) -> None:
    model, (inputs, targets) = Model().eval(), data()
    model.fail = True
    before = snapshot(model)
    with pytest.raises(ValueError, match="half-way"):
        ONE_SHOT[call](model, F.cross_entropy, inputs, targets)
    assert_same(before, snapshot(model))

    def bad_loss(f: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise KeyError("loss")

    model.fail = False
    with pytest.raises(KeyError):
        ONE_SHOT[call](model, bad_loss, inputs, targets)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("call", ONE_SHOT)
def test_one_shot_calls_work_inside_no_grad(call: str) -> None:
    model, (inputs, targets) = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Tanh()), data()
    generator = torch.Generator()
    kwargs = {"generator": generator}
    generator.manual_seed(3)
    expected = ONE_SHOT[call](model, F.cross_entropy, inputs, targets, **kwargs)
    generator.manual_seed(3)
    with torch.no_grad():
        found = ONE_SHOT[call](model, F.cross_entropy, inputs, targets, **kwargs)
    assert torch.equal(found["1"], expected["1"])
    assert found["1"].requires_grad == (call == "create_graph")


def test_loss_module_buffers_are_restored() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, f: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return F.cross_entropy(f, t)

    loss_fn, (inputs, targets) = Loss(), data()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    per_layer_hessian_diagonal(model, loss_fn, inputs, targets, method="exact")
    per_layer_fisher_diagonal(model, loss_fn, inputs, targets)
    assert loss_fn.seen == 0


def test_passive_probe_is_bit_for_bit_invisible_and_leaves_no_trace() -> None:
    torch.manual_seed(1)
    model, (inputs, targets) = Model(), data()
    plain = copy.deepcopy(model)
    before = snapshot(model)
    probe = CurvatureProbe(model, layers=["conv", "frozen"])
    assert list(model.state_dict()) == list(plain.state_dict())
    results = []
    for m in (plain, model):
        torch.manual_seed(2)
        x = inputs.clone().requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)  # batch normalisation in train mode couples samples
            out = m(x)
        F.cross_entropy(out, targets).backward()
        state = {k: v.clone() for k, v in m.state_dict().items()}
        grads = {k: p.grad for k, p in m.named_parameters()}
        results.append({"out": out.detach(), "x": x.grad, "grads": grads, "state": state, "rng": torch.get_rng_state()})
    assert_same(*results)
    assert probe.num_samples == 5
    probe.detach()
    after = snapshot(model)
    for key in ("identities", "flags", "modes", "hooks", "attributes"):
        assert_same(before[key], after[key])


def test_a_probed_model_can_be_copied_and_pickled() -> None:
    model, (inputs, targets) = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), data()
    probe = CurvatureProbe(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(inputs), model(inputs))
        F.cross_entropy(twin(inputs), targets).backward()
    assert probe.num_samples == 0
    F.cross_entropy(model(inputs), targets).backward()
    assert probe.num_samples == 5


def test_probe_errors_lose_nothing() -> None:
    model, (inputs, targets) = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(inputs), targets).backward()
        before = probe.fisher_diagonal()
        with pytest.raises(NonFiniteError):
            probe.hessian_diagonal(F.cross_entropy, inputs * float("nan"), targets)
        assert probe.num_samples == 5
        assert torch.equal(probe.fisher_diagonal()["1"], before["1"])


def test_fully_frozen_model_is_measured() -> None:
    model, (inputs, targets) = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)), data()
    expected = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="exact")
    fisher = per_layer_fisher_diagonal(model, F.cross_entropy, inputs, targets)
    model.requires_grad_(False)
    for name, value in per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="exact").items():
        assert torch.equal(value, expected[name])
    for name, value in per_layer_fisher_diagonal(model, F.cross_entropy, inputs, targets).items():
        assert torch.equal(value, fisher[name])


def test_a_model_that_keeps_a_tuple_of_a_type_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(36, 3))
    model.label = Label((1, -1))
    inputs, targets = torch.randn(5, 36), torch.randint(3, (5,))
    per_layer_fisher_diagonal(model, F.cross_entropy, inputs, targets)
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(inputs), targets).backward()
        probe.fisher_diagonal()
