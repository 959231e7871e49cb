"""The way of each layer's Fisher, and its products, before any is paid."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from secorder import CurvatureProbe, InvalidArgumentError
from secorder.oneshot import fisher_cost as module
from secorder.oneshot import heaviest
from secorder.oneshot.fisher_cost import fisher_cost
from secorder.oneshot.fisher_pairs import Asked
from secorder.oneshot.timing import seconds_per_product

from ..benchmarks.memory import peak_memory
from ..helpers import data, make, measured, mlp, seed, seeded

MODELS = {"rules": make, "a layer without one": lambda: make(nn.Bilinear(5, 5, 5).requires_grad_(False), nn.Tanh())}


def penalised(model: nn.Module) -> Any:
    def loss(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + model[0].weight.square().sum()  # type: ignore[union-attr,operator]

    return loss


@pytest.mark.parametrize(("fisher_type", "products", "by_loop"), [("empirical", 1, 1), ("type-2", 2, 3), ("mc", 5, 5)])
def test_what_is_said_is_what_is_done(fisher_type: Any, products: int, by_loop: int) -> None:
    for loops in (False, True):
        model, batch = make(), data()
        loss_fn = penalised(model) if loops else F.cross_entropy
        chosen = measured(lambda task: fisher_cost(task, Asked(fisher_type, 5)), model, batch, loss_fn)
        each = [6 * by_loop if loops else products] * len(chosen)
        if fisher_type == "type-2" and not loops:
            each[-1] = 0  # the head's diagonal is known without a column
        assert [cost.num_hvps for cost in chosen.values()] == each
        if loops and fisher_type != "empirical":
            continue  # refused, when it is measured
        with CurvatureProbe(model) as probe:
            draws = {"num_draws": 5} if fisher_type == "mc" else {}
            info = probe.fisher_diagonal(loss_fn, *batch, fisher_type=fisher_type, **draws).info
        assert {name: i.strategy for name, i in info.items()} == {name: cost.strategy for name, cost in chosen.items()}


@pytest.mark.parametrize("loops", [False, True])
def test_seconds_are_those_of_the_layers_and_of_what_is_done_anyway(loops: bool) -> None:
    model = make()
    cost = measured(
        lambda task: fisher_cost(task, Asked()), model, data(), penalised(model) if loops else F.cross_entropy
    )
    assert cost.overhead > 0
    assert all((c.seconds > 0) == loops and c.num_bytes > 0 for c in cost.values())  # one column is done by the checks
    assert torch.is_grad_enabled()


def test_columns_that_fit_no_cache_together_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than 64 each is taken to be three times as dear: what is told of 150 is what they take."""
    tried: list[int] = []

    def seconds(work: Any) -> float:
        work()
        columns = tried[-1]
        return 1e-3 + 1e-5 * columns * (1 if columns <= 64 else 3)

    def trial(task: Any, asked: Any, given: Any) -> Any:
        tried.append(given.columns)
        return real(task, asked, given)

    real = module._tried
    monkeypatch.setattr(module, "_tried", trial)
    monkeypatch.setattr(module, "least_seconds_of", seconds)
    cost = measured(lambda task: fisher_cost(task, Asked("mc", 150)), make(), data(), F.cross_entropy)
    assert max(tried) == 150
    assert cost.seconds == pytest.approx(1e-3 + 3e-5 * 150, rel=0.05)


@pytest.mark.parametrize("outputs", [3, 120])
def test_columns_and_draws_down_to_an_error_are_told(outputs: int) -> None:
    seed()
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))
    batch = torch.randn(6, 5), torch.arange(6) % outputs
    how: dict[str, Any] = {"fisher_type": "type-2", "rtol": 0.1}
    with CurvatureProbe(model) as probe:
        cost = probe.estimate_cost(F.cross_entropy, *batch, quantity="fisher", **how)
        info = probe.fisher_diagonal(F.cross_entropy, *batch, **how, generator=seeded()).info
    assert {name: i.strategy for name, i in info.items()} == {name: c.strategy for name, c in cost.items()}
    if outputs == 3:  # all of its columns
        assert cost["0"].num_hvps == 2
    else:
        assert info["0"].num_draws / 2 < cost["0"].num_hvps < 120 + 4 * info["0"].num_draws
    with CurvatureProbe(model) as probe, pytest.raises(InvalidArgumentError, match="type-2"):
        probe.estimate_cost(F.cross_entropy, *batch, quantity="fisher", rtol=0.1)


def test_what_is_timed_is_not_metered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meter of memory makes small operations several times as long."""
    metered: list[bool] = []

    def seconds(*args: Any) -> float:
        metered.append(_get_current_dispatch_mode() is not None)
        return seconds_per_product(*args)

    monkeypatch.setattr(heaviest, "seconds_per_product", seconds)
    with CurvatureProbe(mlp()) as probe:
        probe.estimate_cost(F.cross_entropy, *data(), quantity="fisher", fisher_type="type-2", rtol=0.1)
    assert metered == [False]


def test_memory_of_heaviest_columns_is_that_which_is_spent() -> None:
    """Some at once of the many, each sample's own, of which few were tried."""
    model = nn.Sequential(nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 300))
    batch = torch.randn(32, 20), torch.arange(32)
    how: dict[str, Any] = {"fisher_type": "type-2", "rtol": 0.2}
    with CurvatureProbe(model) as probe:
        told = probe.estimate_cost(F.cross_entropy, *batch, quantity="fisher", **how).num_bytes
        spent = peak_memory(lambda: probe.fisher_diagonal(F.cross_entropy, *batch, **how))
    assert told / 1.5 < spent < 1.5 * told


class Block(nn.TransformerEncoderLayer):
    """Attention and a small net, which returns a tuple as recurrent layers do."""

    def __init__(self) -> None:
        super().__init__(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return (super().forward(x),)


class Recurrent(nn.Module):
    """A core of which much more is kept for backward than it returns, and a head on the last step."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.core(x)[0][:, -1])
        return found


def convolutions() -> nn.Module:
    """Patches are formed of them, and little is kept."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 3)
    )


MEMORY = {
    "rnn": (lambda: Recurrent(nn.RNN(16, 32, batch_first=True)), (16, 24, 16)),
    "gru": (lambda: Recurrent(nn.GRU(16, 32, batch_first=True)), (16, 24, 16)),
    "block": (lambda: Recurrent(Block()), (8, 24, 32)),
    "convolutions": (convolutions, (16, 3, 14, 14)),
    "mlp": (lambda: nn.Sequential(nn.Linear(100, 64), nn.Tanh(), nn.Linear(64, 3)), (64, 100)),
}


@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
@pytest.mark.parametrize("name", MEMORY)
def test_memory_that_is_told_is_that_which_is_spent(name: str, fisher_type: Any) -> None:
    make_model, shape = MEMORY[name]
    model, batch = make_model(), (torch.randn(shape), torch.randint(3, shape[:1]))
    with CurvatureProbe(model, "all") as probe:
        told = probe.estimate_cost(F.cross_entropy, *batch, quantity="fisher", fisher_type=fisher_type).num_bytes
        spent = peak_memory(lambda: probe.fisher_diagonal(F.cross_entropy, *batch, fisher_type=fisher_type))
    assert told / 1.5 < spent < 1.5 * told


def test_memory_of_a_data_set_is_that_which_is_spent() -> None:
    """With the mean over batches and its error, beside the Fisher of one."""
    model, batch = (
        nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 3)),
        (torch.randn(4, 300), torch.arange(4) % 3),
    )
    with CurvatureProbe(model) as probe:
        told = probe.estimate_cost(F.cross_entropy, [batch] * 3, quantity="fisher").num_bytes
        spent = peak_memory(lambda: probe.fisher_diagonal(F.cross_entropy, [batch] * 3))
    assert told / 1.5 < spent < 1.5 * told


def test_memory_of_batches_of_one_is_that_which_is_spent() -> None:
    seed()
    model = nn.Sequential(nn.Linear(60, 64), nn.Tanh(), nn.Linear(64, 3))
    batch = torch.randn(16, 60), torch.arange(16) % 3
    with CurvatureProbe(model) as probe:
        cost = probe.estimate_cost(penalised(model), *batch, quantity="fisher")
        spent = peak_memory(lambda: probe.fisher_diagonal(penalised(model), *batch))
    assert {c.strategy for c in cost.values()} == {"loop"}
    assert cost.num_bytes / 1.5 < spent < 1.5 * cost.num_bytes
