"""Hessians of parameters that no layer with a rule holds: in what the operations compute that take them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder._torch.graph import tells_recomputation

from ...helpers import run_again_where_nothing_tells, seed, seeded
from ...reference import assert_all_close, hessian_by_element

N, T, W = 4, 2, 3


class Own(nn.Module):
    """Parameters of its own between two layers."""

    def __init__(self, forward: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.before, self.after, self.how = nn.Linear(W, W), nn.Linear(W, 3), forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.5 * torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.how(self, torch.tanh(self.before(x)))
        return self.after(torch.tanh(z).sum(1))


#: Linear in their parameters.
LINEAR: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "addmm": (lambda m, x: torch.addmm(m.b, x.view(-1, W), m.w).view(*x.shape), {"w": (W, W), "b": (W,)}),
    "matmul": (lambda m, x: x @ m.w, {"w": (W, W)}),
    "linear": (lambda m, x: F.linear(x, m.w, m.b), {"w": (W, W), "b": (W,)}),
    "packed": (
        lambda m, x: sum(F.linear(x, w) for w in m.w.chunk(2)),
        {"w": (2 * W, W)},
    ),
    "norm by hand": (lambda m, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1) * m.w, {"w": (W,)}),
    "one plus weight": (lambda m, x: x * (1 + m.w), {"w": (W,)}),
    "layer norm": (lambda m, x: F.layer_norm(x, (W,), m.w, m.b), {"w": (W,), "b": (W,)}),
    "token and places": (
        lambda m, x: torch.cat([m.token.expand(len(x), 1, W), x], 1) + m.places,
        {"token": (1, 1, W), "places": (T + 1, W)},
    ),
    "table": (lambda m, x: x + m.w[torch.arange(T)], {"w": (T + 1, W)}),
    "convolution": (lambda m, x: F.conv1d(x.mT, m.w, m.b, padding=1).mT, {"w": (W, W, 3), "b": (W,)}),
    "scaled": (lambda m, x: F.linear(x, m.w * 0.3, m.b / 2), {"w": (W, W), "b": (W,)}),
    "masked": (lambda m, x: F.linear(x, torch.eye(W, dtype=x.dtype).roll(1, 0) * m.w), {"w": (W, W)}),
    "a magnitude by a norm": (
        lambda m, x: x * (m.w / torch.arange(1, W + 1, dtype=x.dtype) - 1) + x * (2.0 * m.w),
        {"w": (W,)},
    ),
    "one after the other": (lambda m, x: (x + m.a) @ torch.eye(W, dtype=x.dtype) + m.b, {"a": (W,), "b": (W,)}),
}

#: Of these, where nothing is multiplied: no tensor is saved that would have to be told.
ONLY_ADDED = ("token and places", "one after the other")

#: Not linear in them all together.
NOT_LINEAR: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "twice": (lambda m, x: torch.tanh(x @ m.w) @ m.w.t(), {"w": (W, W)}),
    "square": (lambda m, x: x * (m.w * m.w), {"w": (W,)}),
    "exponential": (lambda m, x: x * m.w.exp(), {"w": (W,)}),
    "two factors": (lambda m, x: x @ m.a @ m.b, {"a": (W, 2), "b": (2, W)}),
    "gate of its own": (lambda m, x: torch.sigmoid(x + m.b) * m.w, {"w": (W,), "b": (W,)}),
    "product": (lambda m, x: F.linear(x, m.a * m.b), {"a": (W, W), "b": (W, W)}),
    "over each other": (lambda m, x: F.linear(x, m.a / (2 + m.b)), {"a": (W, W), "b": (W, W)}),
    "inverse": (lambda m, x: F.linear(x, 2 / (3 + m.a)), {"a": (W, W)}),
    "quotient": (lambda m, x: x / (2 + m.w), {"w": (W,)}),
}


def made(how: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]]) -> tuple[nn.Module, Tensor, Tensor]:
    seed()
    return Own(how, shapes).double(), torch.randn(N, T, W, dtype=torch.float64), torch.arange(N) % 3


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in ONLY_ADDED else run_again_where_nothing_tells) for x in LINEAR]
)
def test_draws_on_what_is_linear(name: str) -> None:
    model, x, targets = made(*LINEAR[name])
    with CurvatureProbe(model, "all") as probe:
        exact = probe.hessian_diagonal(F.cross_entropy, x, targets, method="exact")
        how: Any = {"method": "hutchinson", "num_draws": 300, "generator": seeded()}
        drawn = probe.hessian_diagonal(F.cross_entropy, x, targets, **how)
    assert_all_close(exact.by_parameter(), hessian_by_element(model, F.cross_entropy, x, targets))
    assert drawn.info[""].strategy in ("output-draws", "columns+output-draws")
    assert {"own_use": True, "samples_independent": True}.items() <= drawn.info[""].checks.items()
    assert drawn.standard_error is not None
    spread = drawn.standard_error[""]
    assert ((drawn[""] - exact[""]).abs() <= 6 * spread + 1e-12).all()


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_goes_by_its_parameters(name: str) -> None:
    model, x, targets = made(*NOT_LINEAR[name])
    with CurvatureProbe(model, "all") as probe:
        exact = probe.hessian_diagonal(F.cross_entropy, x, targets, method="exact")
        drawn = probe.hessian_diagonal(F.cross_entropy, x, targets, method="hutchinson", num_draws=2)
    assert drawn.info[""].strategy == "parameter-draws"
    assert_all_close(exact.by_parameter(), hessian_by_element(model, F.cross_entropy, x, targets))


@run_again_where_nothing_tells
@pytest.mark.parametrize("name", ["addmm", "packed", "convolution"])
def test_the_basis_of_one_sample_is_less_than_that_of_the_parameters(name: str) -> None:
    model, x, targets = made(*LINEAR[name])
    with CurvatureProbe(model, "all") as probe:
        found = probe.hessian_diagonal(F.cross_entropy, x, targets, method="exact")
    assert found.info[""].strategy == "output-basis"
    assert found.info[""].num_hvps <= T * W * (1 + (name == "packed")) + 2  # with what checks that it may be
    assert_all_close(found.by_parameter(), hessian_by_element(model, F.cross_entropy, x, targets))


class OneOutput(Own):
    """After its own parameters, the model is linear, and has one output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.how(self, torch.tanh(self.before(x))).sum(1))[:, :1]


@pytest.mark.parametrize("name", [x for x in LINEAR if x not in ONLY_ADDED])
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_one_column_gives_all_of_one_output(name: str, method: Any) -> None:
    seed()
    how, shapes = LINEAR[name]
    model, x = OneOutput(how, shapes).double(), torch.randn(N, T, W, dtype=torch.float64)
    targets = torch.randn(N, 1, dtype=torch.float64)
    with CurvatureProbe(model, "all") as probe:
        probe.estimate_cost(F.mse_loss, x, targets, method=method)
        found = probe.hessian_diagonal(F.mse_loss, x, targets, method=method)
    expected = hessian_by_element(model, F.mse_loss, x, targets)
    if found.info[""].strategy == "columns":
        own = {key: value for key, value in found.by_parameter().items() if key in shapes}
        assert_all_close(own, {key: expected[key] for key in own})
    assert method == "exact" or found.info[""].strategy == "columns" or not tells_recomputation()
