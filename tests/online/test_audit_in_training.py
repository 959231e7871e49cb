"""The audit of each recorded backward: what captured calls do not explain is seen, and nothing else is."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from secorder import AttributionError, CurvatureProbe
from secorder.online.reading import unreadable

from ..helpers import Fn, Net, data, make, no_warnings, reference, seed
from ..reference import assert_all_close
from .loops import follow

Pair = tuple[Tensor, Tensor]


def classify(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def suspects(probe: CurvatureProbe) -> set[str]:
    return set(unreadable(probe._fisher))


@pytest.mark.parametrize("period", [1, 3, 7, 16])
@pytest.mark.parametrize("names", [["0"], ["2"], ["0", "2"]])
@pytest.mark.parametrize("kind", ["l2", "l1", "tiny"])
def test_a_penalty_at_each_kth_step_is_seen_at_once(period: int, names: list[str], kind: str) -> None:
    model = make()
    probe = CurvatureProbe(model)
    for index in range(period):
        loss = classify(model, data())
        if index == period - 1:
            assert not suspects(probe)
            for name in names:
                weight = model[int(name)].weight
                loss = loss + {"l2": weight.pow(2).sum(), "l1": weight.abs().sum(), "tiny": 1e-9 * weight.sum()}[kind]
        loss.backward()
    assert suspects(probe) == set(names)
    probe.reset()
    classify(model, data()).backward()
    assert not suspects(probe)


def test_lazy_r1_by_a_derivative_of_the_input() -> None:
    """At every third step the discriminator's own derivative is a part of the loss, as StyleGAN2 does it."""
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 1))

    def step(penalty: bool) -> None:
        x = torch.randn(8, 4, requires_grad=penalty)
        out = model(x)
        loss = F.softplus(-out).mean()
        if penalty:
            loss = loss + 5 * torch.autograd.grad(out.sum(), x, create_graph=True)[0].pow(2).sum(1).mean()
        loss.backward()

    probe = CurvatureProbe(model)
    for penalty in (False, False, True):
        assert not suspects(probe)
        step(penalty)
    assert {"a", "b"} & suspects(probe) == {"a", "b"}


def test_r1_in_a_backward_of_its_own() -> None:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 1))
    probe = CurvatureProbe(model)
    F.softplus(-model(torch.randn(8, 4))).mean().backward()
    assert not suspects(probe)
    x = torch.randn(8, 4, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].pow(2).sum(1).mean().backward()
    assert suspects(probe) == {"a", "b"}


def test_hooks_on_parameters_do_not_change_the_fisher() -> None:
    model, bare = make(), make()
    model[2].weight.register_hook(lambda g: g * 0.0)
    model[0].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    model[0].bias.register_hook(lambda g: g + 1)
    probe = CurvatureProbe(model, reduction="mean")
    expected: dict[str, Tensor] = {}
    for step in range(3):
        if step == 1:
            model[2].bias.register_hook(lambda g: g * 2)
        batch = data()
        classify(model, batch).backward()
        for name, value in reference(bare, batch).items():
            expected[name] = expected.get(name, 0.0) + value / 3
    assert not suspects(probe)
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


@pytest.mark.parametrize(
    "hook",
    [lambda g: g * 2, lambda g: g * torch.arange(1, 7)[:, None], lambda g: g.clamp(-0.02, 0.02), lambda g: -g],
    ids=["scaled", "by sample", "clipped", "reversed"],
)
@pytest.mark.parametrize("where", ["before", "after", "module", "output"])
@pytest.mark.parametrize("steps", [{0, 1, 2}, {1}])
def test_hooks_on_activations_are_followed(hook: Callable[[Tensor], Tensor], where: str, steps: set[int]) -> None:
    """What hooks of tensors and modules make of gradients is a part of the model, or it is not told."""
    at = {"step": 0}

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.a(x)
        if at["step"] in steps and len(x) == 6 and hidden.requires_grad and where != "module":
            if where == "before":
                hidden.register_hook(hook)
            hidden = torch.tanh(hidden)
            if where == "after":
                hidden.register_hook(hook)
            out = m.b(hidden)
            if where == "output":
                out.register_hook(hook)
            return out
        return m.b(torch.tanh(hidden))

    model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    probe = CurvatureProbe(model, reduction="mean")
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(3):
        at["step"] = step
        x, y = data()
        handle = None
        if where == "module" and step in steps:
            handle = model.a.register_full_backward_hook(lambda m, gi, go: None)
        # Per-sample gradients by one vjp a sample through the same graph: rows of the gradient that the hook has seen.
        with probe.paused():
            expected_of_step(model, x, y, expected, hook if step in steps else None, where)
        classify(model, (x, y)).backward()
        if handle is not None:
            handle.remove()
    if suspects(probe):
        return
    if where != "module" and bool((hook(torch.ones(6, 1)) == 0.02).all()):
        with pytest.raises(AttributionError, match="clamps or normalises them"):
            probe.fisher_diagonal()
        return
    found = probe.fisher_diagonal().by_parameter()
    for name, value in expected.items():
        assert torch.allclose(found[name], value / 18, rtol=1e-9, atol=1e-12), name


def expected_of_step(model: Any, x: Tensor, y: Tensor, expected: dict[str, Tensor], hook: Any, where: str) -> None:
    z = model.a(x).detach().requires_grad_(True)
    h = torch.tanh(z)
    out = model.b(h)
    (g_out,) = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), out, retain_graph=True)
    if hook is not None and where == "output":
        g_out = hook(g_out / 6) * 6
    (g_h,) = torch.autograd.grad(out, h, g_out, retain_graph=True)
    if hook is not None and where == "after":
        g_h = hook(g_h / 6) * 6
    (g_z,) = torch.autograd.grad(h, z, g_h)
    if hook is not None and where == "before":
        g_z = hook(g_z / 6) * 6
    for name, g, a in (("a", g_z, x), ("b", g_out, h.detach())):
        expected[f"{name}.weight"] += (g.square().T @ a.square()).detach()
        expected[f"{name}.bias"] += g.square().sum(0).detach()


@pytest.mark.parametrize("wrap", ["spectral", "weight norm", "old spectral", "orthogonal"])
@pytest.mark.parametrize("layer_types", [None, "all"])
def test_parametrizations_in_train_mode(wrap: str, layer_types: Any) -> None:
    wraps: dict[str, Callable[[nn.Module], nn.Module]] = {
        "spectral": parametrizations.spectral_norm,
        "weight norm": parametrizations.weight_norm,
        "old spectral": nn.utils.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }
    seed(1)
    model = nn.Sequential(wraps[wrap](nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))

    def update() -> None:
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.5 * p.grad

    batches = [(torch.randn(6, 6), torch.randint(3, (6,))) for _ in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        came = follow(model, batches, classify, after=update, layer_types=layer_types, tolerance=1e-8)
    assert not came.refused


class Cells(nn.Module):
    """Both states of a cell are computed from each other, and both go on."""

    def __init__(self, kind: str = "LSTMCell") -> None:
        super().__init__()
        self.cell, self.head = getattr(nn, kind)(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        last = state[1] if isinstance(state, tuple) else state
        return self.head(torch.stack(outputs, 1).mean(1) + last)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind: str) -> None:
    batches = [(torch.randn(n, t, 4), torch.randint(3, (n,))) for n, t in [(4, 3), (4, 3), (4, 5), (3, 3), (4, 4)]]
    assert follow(Cells(kind), batches, classify, layer_types="all").exact


def test_a_use_outside_at_some_steps() -> None:
    """The layer is also used as a function, now and then."""
    at = {"step": 0}

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.a(x))
        return m.b(hidden) + (F.linear(hidden, m.b.weight) if at["step"] == 2 else 0)

    model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    probe = CurvatureProbe(model)
    for step in range(3):
        at["step"] = step
        assert not suspects(probe)
        classify(model, data()).backward()
    assert suspects(probe) == {"b"}


@pytest.mark.parametrize("called", [True, False])
def test_a_penalty_on_a_layer_that_the_loss_does_not_reach(called: bool) -> None:
    """Its gradient is accumulated before the backward comes to the model."""
    model = Net(lambda m, x: m.a(x) + (m.b(x).detach() if called else 0), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    probe = CurvatureProbe(model)
    classify(model, data()).backward()
    assert not suspects(probe)
    model.zero_grad(set_to_none=False)
    loss = classify(model, data())
    model.zero_grad(set_to_none=False)
    loss.backward()
    assert not suspects(probe)
    (classify(model, data()) + model.b.weight.square().sum()).backward()
    assert suspects(probe) == {"b"}


def test_a_weight_that_is_used_in_the_loss() -> None:
    model = make()
    probe = CurvatureProbe(model)
    classify(model, data()).backward()
    assert not suspects(probe)
    (classify(model, data()) + F.linear(torch.randn(2, 4), model[0].weight).square().mean()).backward()
    assert suspects(probe) == {"0"}


@pytest.mark.parametrize("cleared", ["before the forward", "before the backward", "in place", "never"])
@pytest.mark.parametrize("used", ["in the loss", "in both", "in the model"])
def test_a_parameter_of_the_model_that_the_loss_uses(used: str, cleared: str) -> None:
    """Such as the temperature of CLIP, or the weights of tasks: its gradient may all have come before the model's."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x))) * (1 if used == "in the loss" else m.scale.exp())

    model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    model.scale = nn.Parameter(torch.ones(()))
    probe = CurvatureProbe(model, layer_types="all")
    for _ in range(3):
        if cleared == "before the forward":
            model.zero_grad()
        x, y = data()
        out = model(x)
        if cleared in ("before the backward", "in place"):
            model.zero_grad(set_to_none=cleared != "in place")
        loss = F.cross_entropy(out, y)
        (loss if used == "in the model" else loss * model.scale.exp()).backward()
        assert suspects(probe) == (set() if used == "in the model" else {""})
        assert not probe._fisher.troubles.left_out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_optimizer_that_steps_inside_of_backward() -> None:
    model = make()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    probe = CurvatureProbe(model)
    expected: dict[str, Tensor] = {}
    for _ in range(4):
        batch = data()
        for name, value in reference(model, batch).items():
            expected[name] = expected.get(name, 0.0) + value / 4
        classify(model, batch).backward()
    assert not suspects(probe)
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


def test_accumulated_gradients() -> None:
    model = make()
    probe = CurvatureProbe(model)
    for _ in range(4):
        classify(model, data()).backward()  # .grad grows
    assert not suspects(probe)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 1000).long() % 20
        return self.head(torch.tanh(self.table(ids)).mean(1))


class Blocks(nn.Module):
    """A small transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x.roll(1, 1), x.roll(2, 1)], 1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def convolutional() -> nn.Module:
    return Net(lambda m, x: m.head(F.relu(m.second(F.relu(m.first(x.view(-1, 1, 2, 2))))).flatten(1)),
               first=nn.Conv2d(1, 4, 2, padding=1), second=nn.Conv2d(4, 4, 3, padding=1, groups=2),
               head=nn.Linear(36, 3))  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": make,
    "wide": lambda: nn.Sequential(nn.Linear(4, 600), nn.ReLU(), nn.Linear(600, 300), nn.ReLU(), nn.Linear(300, 3)),
    "convolutional": convolutional,
    "embedding": Embedded,
    "transformer": Blocks,
}


AVERAGED: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Sequential(Fn(lambda x: x[:, None]), nn.Conv1d(1, 8, 9), nn.AdaptiveAvgPool1d(1)),
    "transposed": lambda: nn.Sequential(Fn(lambda x: x[:, None]), nn.ConvTranspose1d(1, 8, 3), nn.AdaptiveAvgPool1d(1)),
    "layer norm": lambda: nn.Sequential(Fn(lambda x: x.view(8, -1, 8)), nn.LayerNorm(8), Fn(lambda x: x.mean(1))),
    "one row": lambda: nn.Sequential(Fn(lambda x: x.view(8, -1).long()), nn.Embedding(1, 8), Fn(lambda x: x.mean(1))),
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_no_false_alarm_behind_an_average_over_many_positions(kind: str) -> None:
    """PyTorch adds thousands of equal numbers one after the other, in float32, and is off by a ten-thousandth."""
    model = nn.Sequential(AVERAGED[kind](), nn.Flatten(), nn.Linear(8, 3)).float()
    probe = CurvatureProbe(model, layer_types="all")
    for _ in range(4):
        classify(model, (torch.rand(8, 8192, dtype=torch.float32), torch.full((8,), 1))).backward()
        model.zero_grad()
    assert not suspects(probe)
    for _ in range(4):
        loss = classify(model, (torch.rand(8, 8192, dtype=torch.float32), torch.full((8,), 1)))
        (loss + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
        model.zero_grad()
    assert len(suspects(probe)) == 2


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast", "float64"])
def test_no_false_alarm(kind: str, precision: str) -> None:
    """Over many random steps, with numbers tiny and huge."""
    random = torch.Generator().manual_seed(5)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
    model = MODELS[kind]().to(dtype)
    probe = CurvatureProbe(model, layer_types="all", loss_scale=1.0)  # whatever the loss is multiplied by
    alarms = []
    for step in range(60 if precision == "float32" else 20):
        count = int(torch.randint(2, 40, (), generator=random))
        scale = 10.0 ** float(torch.randint(-6, 7, (), generator=random))
        inner = 10.0 ** float(torch.randint(-3, 4, (), generator=random))
        x, y = (
            (torch.randn(count, 4, generator=random, dtype=torch.float64) * inner).to(dtype),
            torch.randint(3, (count,)),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = F.cross_entropy(model(x).float() if dtype is torch.bfloat16 else model(x), y) * scale
        loss.backward()
        if suspects(probe):
            alarms.append((step, count, scale, inner, suspects(probe)))
            probe.reset()
    assert not alarms


@pytest.mark.parametrize("kind", ["mlp", "convolutional", "embedding", "transformer"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_change_of_a_thousandth_is_seen_in_float32(kind: str, scale: float) -> None:
    """Of the gradient of any parameter, in a few steps: of a convolution in 3 or 4 in the mean, else in 1 or 2."""
    model = MODELS[kind]().float()
    unseen = []
    for name, p in model.named_parameters():
        probe = CurvatureProbe(model, layer_types="all")
        for _ in range(100):  # of many layers, and of a convolution's weight, a part is looked at each time
            x, y = torch.randn(12, 4).float(), torch.randint(3, (12,))
            (gradient,) = torch.autograd.grad(classify(model, (x, y)), p)
            (classify(model, (x, y)) * scale + 1e-3 * scale * (p * gradient).sum()).backward()
            if name.rpartition(".")[0] in suspects(probe):
                break
        else:
            unseen.append(name)
        probe.detach()
    assert not unseen


def test_a_shared_row_where_only_a_loss_is_returned() -> None:
    """Positions that all samples share, in a model that returns the loss itself besides its logits, or alone."""

    class Nano(nn.Module):
        def __init__(self, alone: bool) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(11, 4), nn.Embedding(8, 4)
            self.fc, self.head, self.alone = nn.Linear(4, 4), nn.Linear(4, 11), alone

        def forward(self, ids: Tensor, targets: Tensor) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            logits = self.head(torch.tanh(self.fc(x)).cumsum(1))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return loss if self.alone else (logits, loss)

    batches = [(torch.randint(11, (n, t)), torch.randint(11, (n, t))) for n, t in [(4, 6), (4, 6), (3, 5), (4, 4)]]

    def of_loss(m: Any, b: Pair) -> Tensor:
        out = m(*b)
        return out if isinstance(out, Tensor) else out[1]

    for alone in (False, True):
        for layer_types in (None, "all"):
            came = follow(Nano(alone), batches, of_loss, layer_types=layer_types)
            assert set(came.left_out) | set(came.refused) <= {"positions"}


def test_what_is_suspect_is_said_when_it_is_read() -> None:
    model = make()
    probe = CurvatureProbe(model, reduction="mean")
    with no_warnings():  # training goes on in silence
        (classify(model, data()) + model[0].weight.square().sum()).backward()
    assert probe.fisher_diagonal(missing="skip").keys() == {"2"}
