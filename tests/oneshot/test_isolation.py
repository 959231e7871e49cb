"""An isolated model runs from one state again and again, and goes back as it was."""

import _thread
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, NonFiniteError, per_layer_fisher_diagonal, per_layer_hessian_diagonal
from secorder.layers.selection import select_layers
from secorder.oneshot.isolation import isolate, run_isolated
from secorder.oneshot.loss import check_loss, losses
from secorder.oneshot.recording import recorded

from ..helpers import Fn, data, make
from ..reference import assert_all_close, fisher_by_sample, hessian_by_element


def random_model() -> nn.Sequential:
    return make(nn.BatchNorm1d(5), nn.Dropout())


def test_each_run_starts_from_the_same_state() -> None:
    model, (x, _) = random_model(), data()
    layers, weight = select_layers(model), model[0].weight
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with isolate(model, None, layers) as isolated:
        first, second = isolated.forward(x), isolated.forward(x)
        assert torch.equal(first, second)
        replacement = isolated.replacement(weight)
        assert model[0].weight is replacement is not weight
        assert replacement.data_ptr() == weight.data_ptr()
        (gradient,) = torch.autograd.grad(first.sum(), replacement)
        assert gradient.shape == replacement.shape
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_recorded_leaves_are_the_gradients_of_outputs() -> None:
    model, (x, y) = random_model(), data()
    layers = select_layers(model)
    with isolate(model, None, layers) as isolated, recorded(isolated, layers, own_parameters=False) as recording:
        output = isolated.forward(x)
        g_by_leaf = torch.autograd.grad(F.cross_entropy(output, y), recording.leaves["3"])
        assert torch.autograd.grad(output.sum(), isolated.replacements(layers[0]), allow_unused=True) == (None, None)
    z = output.detach().requires_grad_()
    torch.testing.assert_close(g_by_leaf, torch.autograd.grad(F.cross_entropy(z, y), z))
    assert not model[0]._forward_hooks


class Cached(nn.Module):
    """Keeps its weight where no replacement parameter gets to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.kept = [self.fc.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kept[0], self.fc.bias)


def test_parameters_that_replacements_do_not_reach() -> None:
    model, (x, _) = Cached(), data()
    layers, tried = select_layers(model), []

    def work(direct: bool) -> Any:
        tried.append(direct)
        with isolate(model, None, layers, direct=direct) as isolated:
            output = isolated.forward(x)
            isolated.require_replacements(output)
            return torch.autograd.grad(output.sum(), isolated.replacement(model.fc.weight))[0]

    torch.testing.assert_close(run_isolated(work), x.sum(0).expand(3, -1))
    assert tried == [False, True]


def test_losses_of_several_batches() -> None:
    model = nn.Linear(4, 3)
    batches = [data() for _ in range(3)]
    found = losses(model, F.cross_entropy, batches)
    torch.testing.assert_close(found, torch.stack([F.cross_entropy(model(x), y).detach() for x, y in batches]))


def test_a_loss_that_is_not_finite_names_where_it_began() -> None:
    model, (x, y) = make(nn.ReLU()), data()
    with torch.no_grad():
        model[2].weight.fill_(torch.inf)
    with isolate(model, F.cross_entropy, []) as isolated:
        loss = F.cross_entropy(isolated.forward(x), y)
        with pytest.raises(NonFiniteError, match="layer '2'"):
            check_loss(loss, isolated, x)


class Scaled(nn.Linear):
    """Reads what was written on its parameter, and counts there."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight.scale, self.weight.calls = 2.0, 0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        self.weight.calls += 1  # type: ignore[attr-defined]
        return F.linear(x, self.weight * self.weight.scale, self.bias)  # type: ignore[attr-defined]


def test_what_is_written_on_parameters_is_there_and_stays() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Scaled(5, 3)), data()
    weight: Any = model[2].weight
    fisher = per_layer_fisher_diagonal(model, F.cross_entropy, x, y, "all").by_parameter()
    hessian = per_layer_hessian_diagonal(model, F.cross_entropy, x, y, "all").by_parameter()
    assert weight.calls == 0
    assert_all_close(fisher, fisher_by_sample(model, F.cross_entropy, x, y, 6))
    assert_all_close(hessian, hessian_by_element(model, F.cross_entropy, x, y))
    weight.calls = 0
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
        assert weight.calls == 3
        assert_all_close(probe.fisher_diagonal().by_parameter(), fisher)


def test_threads_take_turns() -> None:
    inside, over = threading.Event(), threading.Event()
    model = nn.Sequential(random_model(), Fn(lambda z: (inside.is_set() or inside.set() or over.wait(0.3), z)[-1]))
    parameters, state, found = list(model.parameters()), torch.get_rng_state(), []

    def measured() -> None:
        found.append(per_layer_hessian_diagonal(model, lambda f, t: f.exp().mean(), torch.ones(2, 4)))

    first = threading.Thread(target=measured)
    first.start()
    inside.wait()
    measured()
    over.set()
    first.join()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_thread_of_autograd_does_not_wait_for_what_waits_for_it() -> None:
    """Such as that of a device, which runs what a probe does at the end of a backward."""
    model, done = random_model(), threading.Event()

    def ends_a_backward() -> None:
        with isolate(model, None, []):
            done.set()

    with isolate(model, None, []):
        _thread.start_new_thread(ends_a_backward, ())
        assert done.wait(5)
