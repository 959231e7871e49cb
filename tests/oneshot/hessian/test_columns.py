"""Columns of a root of the loss's Hessian, pulled back to all layers at once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.oneshot.hessian import columns
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.facts import Facts

from ...helpers import Clamped, Doubled, Fn, data, make
from ...reference import assert_all_close, assert_close, hessian_by_element
from .strategies import exact, in_z


def served(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    return in_z(lambda task, found, graph: columns.run(task, found.output_side, [graph])[0], model, batch, "0")


class Guided(torch.autograd.Function):
    """Guided backpropagation, which weights of samples do not show: positive gradients alone go on."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g.clamp(min=0)


@pytest.mark.parametrize("middle", [nn.ReLU(), Fn(torch.relu), nn.LeakyReLU()])
def test_they_are_exact_where_the_model_is_piecewise_linear(middle: nn.Module) -> None:
    model, batch = make(middle), data()
    for value, expected in zip(served(model, batch), exact(model, batch, "0"), strict=True):
        assert_close(value.flatten(), expected)


@pytest.mark.parametrize("middle", [Guided.apply, Clamped.apply])
def test_columns_that_do_not_explain_the_hessian_serve_none(middle: Any) -> None:
    assert served(make(Fn(torch.relu), Fn(middle)), data()) is None


def test_columns_of_either_sign_explain_the_hessian() -> None:
    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        return (f[:, 0].square() - f[:, 1].exp() + f[:, 2] * t).mean()

    model, batch = make(nn.ReLU(), Fn(Doubled.apply)), data()
    with CurvatureProbe(model) as probe:
        hessian = probe.hessian_diagonal(loss_fn, *batch, method="exact")
    assert hessian.info["0"].strategy == "columns"
    assert_all_close(hessian.by_parameter(), hessian_by_element(model, loss_fn, *batch))


def test_it_applies_where_all_of_it_is_known() -> None:
    facts: dict[str, Any] = {"own_use": True, "piecewise_linear": True, "num_columns": 3}
    assert columns.applies(Facts("0", 25, **facts))
    for name in facts:
        assert not columns.applies(Facts("0", 25, **{**facts, name: 0}))
    assert columns.products(Facts("0", 25, **facts), Budget()) == 3
    assert columns.products(Facts("0", 25, last=True, **facts), Budget()) == 0
