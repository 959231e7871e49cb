"""A measurement keeps nothing alive, also of models that are no chains."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secorder
from secorder import CurvatureProbe, SecorderError

from ..helpers import Net, data


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def branches() -> nn.Module:
    """Two paths, one layer called twice, one used outside of its calls."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        h = h + m.b(h) * torch.sigmoid(m.b(torch.relu(m.c(x))))
        return m.d(h) + F.linear(x, m.c.weight)[:, :3]

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4), d=nn.Linear(4, 3))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    return Net(lambda m, x: m.head(m.body(x[:, None].expand(-1, 3, -1)).mean(1)), body=layer, head=nn.Linear(4, 3))


def differentiates_itself() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = m.b(torch.tanh(m.a(x)))
        return energy + torch.autograd.grad(energy.sum(), x, create_graph=True)[0][:, :3]

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))


MODELS = {f.__name__: f for f in (branches, transformer, differentiates_itself)}


def penalised(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) + sum(p.square().sum() for p in model.parameters())

    return loss


def failing(output: Tensor, y: Tensor) -> Tensor:
    raise ZeroDivisionError


CALLS: dict[str, Callable[[CurvatureProbe, nn.Module, Tensor, Tensor], Any]] = {
    "fisher": lambda p, m, x, y: p.fisher_diagonal(F.cross_entropy, x, y),
    "type_2": lambda p, m, x, y: p.fisher_diagonal(F.cross_entropy, x, y, fisher_type="type-2"),
    "mc": lambda p, m, x, y: p.fisher_diagonal(F.cross_entropy, x, y, fisher_type="mc"),
    "loop": lambda p, m, x, y: p.fisher_diagonal(penalised(m), x, y),
    "hessian": lambda p, m, x, y: p.hessian_diagonal(F.cross_entropy, x, y),
    "hutchinson": lambda p, m, x, y: p.hessian_diagonal(F.cross_entropy, x, y, method="hutchinson", num_draws=3),
    "trace": lambda p, m, x, y: p.hessian_trace(F.cross_entropy, x, y, num_draws=3),
    "eigenvalues": lambda p, m, x, y: p.hessian_eigenvalues(F.cross_entropy, x, y, max_iterations=3),
    "cost": lambda p, m, x, y: p.estimate_cost(F.cross_entropy, x, y),
    "diagnose": lambda p, m, x, y: secorder.diagnose(m, F.cross_entropy, x, y, num_draws=3),
    "create_graph": lambda p, m, x, y: p.hessian_diagonal(F.cross_entropy, x, y, create_graph=True),
    "a_loss_that_fails": lambda p, m, x, y: p.hessian_diagonal(failing, x, y),
}


@pytest.mark.filterwarnings("ignore::secorder.CurvatureWarning")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_live_tensors_stay_as_many(name: str, call: str) -> None:
    model, (x, y) = MODELS[name](), data()

    def once() -> None:
        with CurvatureProbe(model) as probe:
            try:
                CALLS[call](probe, model, x, y)
            except (SecorderError, ZeroDivisionError):
                assert call in ("loop", "a_loss_that_fails")

    for _ in range(2):
        once()
    before = live_tensors()
    for _ in range(2):
        once()
    assert live_tensors() == before


def test_nothing_is_left_when_model_and_probe_are_gone() -> None:
    before = live_tensors()

    def once() -> None:
        model, (x, y) = branches(), data()
        with CurvatureProbe(model, "all") as probe:
            for name, call in CALLS.items():
                if name not in ("loop", "a_loss_that_fails", "diagnose"):
                    call(probe, model, x, y)

    once()
    assert live_tensors() == before
