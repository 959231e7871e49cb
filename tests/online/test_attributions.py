"""When a batch is looked at."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.oneshot.isolation import IsolatedModel
from secorder.online.attributions import Attributions
from secorder.online.samples import rows

from ..helpers import Net, data, mlp, run_again_where_nothing_tells, step
from .loops import follow


def test_batches_are_looked_at_at_powers_of_two() -> None:
    model = Net(lambda m, x: m.fc(x), fc=nn.Linear(4, 3))
    with CurvatureProbe(model) as probe:
        looked = []
        for index in range(1, 17):
            before = probe._attributions.any_known()
            step(model, data())
            if probe._attributions.any_known() is not before:
                looked.append(index)
    assert looked == [1, 2, 4, 8, 16]


def test_modes_are_told_apart_and_what_is_known_is_forgotten() -> None:
    model = mlp()
    with CurvatureProbe(model) as probe:
        step(model, data())
        assert probe._attributions.known([(5, 4)]) is not None
        model.eval()
        assert probe._attributions.known([(5, 4)]) is None
        assert probe._attributions.any_known() is not None
        probe._attributions.forget()
        assert probe._attributions.any_known() is None


def test_what_is_trained_is_told_apart_and_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secorder.online.attributions.REMEMBERED", 4)
    model = Net(lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3))
    with CurvatureProbe(model) as probe:
        for index in range(32):
            for p, bit in zip(list(model.parameters())[:5], f"{index:05b}", strict=True):
                p.requires_grad_(bit == "1")
            step(model, data())
            assert probe._attributions.known([(5, 4)]) is not None
            assert len(probe._attributions._known) <= 4
        assert probe.num_samples == 32 * len(data()[0])


def test_a_look_runs_no_backward_hook_of_the_users() -> None:
    model, calls = Net(lambda m, x: m.fc(x), fc=nn.Linear(4, 3)), []
    model.fc.register_full_backward_hook(lambda *_: calls.append(1))
    with CurvatureProbe(model):
        step(model, data())
    assert calls == [1]
    assert torch.is_grad_enabled()


class Prompted(nn.Module):
    """A layer that sees a prompt which all samples share, and a sum behind which each of them has rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.key = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4)
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.hook: Callable[[Tensor], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(x))
        if self.hook is not None and hidden.requires_grad:
            self.hook(hidden)
        return self.head(torch.tanh(hidden[:, None] + self.key(self.prompt)).mean(1))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@run_again_where_nothing_tells
def test_a_batch_that_is_looked_at_again_is_run_once_with_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    run, gradients = IsolatedModel.run, rows.gradients
    forwards, pulled, seen = [], [], []
    monkeypatch.setattr(IsolatedModel, "run", lambda *args: forwards.append(torch.is_grad_enabled()) or run(*args))
    monkeypatch.setattr(rows, "gradients", lambda *args: pulled.append(1) or gradients(*args))

    def after() -> None:
        seen.append((sum(forwards), len(forwards), len(pulled)))
        forwards.clear()
        pulled.clear()

    came = follow(Prompted(), [data(n) for n in range(5, 9)], loss, layer_types="all", after=after)
    assert came.exact
    assert not came.warned
    assert seen == [(2, 6, 0), (1, 2, 0), (0, 0, 0), (1, 2, 0)]


def on_the_tensor(hidden: Tensor) -> None:
    hidden.register_hook(lambda g: g / g.norm())


def on_its_node(hidden: Tensor) -> None:
    assert hidden.grad_fn is not None
    hidden.grad_fn.register_prehook(lambda gs: (gs[0] / gs[0].norm(),))


@pytest.mark.parametrize("hook", [on_the_tensor, on_its_node])
@pytest.mark.parametrize("since", [0, 2])
def test_a_hook_that_couples_gradients_is_seen(hook: Callable[[Tensor], None], since: int) -> None:
    """From the first batch on, or by the next look: the graph, which would be believed, does not show it."""
    model, steps = Prompted(), []

    def after() -> None:
        steps.append(1)
        if len(steps) == since:
            model.hook = hook

    model.hook = None if since else hook
    came = follow(model, [data(n) for n in range(5, 9)], loss, layer_types="all", after=after)
    assert "embed" in came.refused or (since == 0 and came.warned)
    assert "head" not in came.refused


class Saturated(nn.Module):
    """Outputs of which one is nearly one: what becomes of the other one, which is small, does not show beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(torch.tanh(self.norm(self.fc(x)))))


@pytest.mark.filterwarnings("ignore:the samples of a batch influence one another by batch normalisation")
def test_batch_normalisation_couples_samples_where_saturated_outputs_do_not_show_it() -> None:
    model = Saturated()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for index in range(4):
            if index == 1:
                nn.init.constant_(model.head.bias, -40.0)
                nn.init.constant_(model.head.bias[:1], 40.0)
            model(torch.randn(6, 4)).log().sum(1).mean().backward()
        assert set(probe.fisher_diagonal()) == {"fc", "norm", "head"}


class Slight(nn.Module):
    """A branch with batch normalisation that is next to nothing in the outputs, as a layer scale begins."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x + 1e-15 * self.branch(x))
        return found


@pytest.mark.filterwarnings("ignore:the samples of a batch influence one another by batch normalisation")
def test_batch_normalisation_couples_samples_where_its_branch_is_next_to_nothing() -> None:
    model = Slight()
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(2):
            step(model, data())
        known = probe._attributions.any_known()
        assert known is not None
        assert known.normalised
        assert all(layer.rule is not None for layer in known.layers)
        assert set(probe.fisher_diagonal()) == {"branch.0", "branch.3", "head"}


class InTime(nn.Module):
    """Rows of a text, time by time, that are returned as one list of rows, and grow small where a factor does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.scale = nn.Linear(4, 8), nn.Linear(8, 3), torch.ones(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.head(torch.tanh(self.fc(x))) * self.scale
        return rows.flatten(0, 1)


def test_where_rows_of_outputs_were_is_where_they_are_while_nothing_speaks_against_it() -> None:
    model, batches = InTime(), [torch.randn(6, 3, 4, dtype=torch.float64) for _ in range(16)]

    def shrink() -> None:
        model.scale[1:] = 1e-13  # now the rows of the first time alone show what becomes of a sample

    followed = follow(
        model.double(),
        batches,
        lambda m, x: torch.log_softmax(m(x) / model.scale.repeat_interleave(x.shape[1], 0)[:, 0], 1)[:, 0].mean(),
        lambda x: [x[:, n : n + 1] for n in range(x.shape[1])],
        after=shrink,
        sample_dim=1,
    )
    assert followed.exact, followed.refused


class Sorted(nn.Module):
    """Rows that are sorted by what they hold until they are in a loss: no module's rows tell whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        order = x[:, 0].argsort()
        return F.cross_entropy(torch.tanh(self.hidden(x[order]))[:, :3], t[order]), self.head(x)


def test_what_no_look_tells_is_not_looked_for_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked, look = Sorted(), [], Attributions.verify
    with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in range(1, 17):
            monkeypatch.setattr(Attributions, "verify", lambda *args, batch=batch: looked.append(batch) or look(*args))
            loss, out = model(torch.randn(7, 4), torch.arange(7) % 3)
            (loss + out.square().mean()).backward()
        assert set(probe.fisher_diagonal(missing="skip")) == {"head"}
    assert looked == [1, 2, 4, 8, 16]
