"""The basis of one sample's outputs, all samples at once."""

import torch

from secorder.layers.layout import DIM_ZERO
from secorder.oneshot.hessian import output_basis
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.facts import Facts

from ...helpers import data, mlp
from ...reference import assert_close
from .strategies import exact, in_z


def test_it_is_exact_with_a_product_for_each_output() -> None:
    model, batch, told = mlp(), data(), []

    def run(task, found, graph):  # type: ignore[no-untyped-def]
        graph.layouts = [DIM_ZERO]
        return output_basis.run(task, graph, 10, told.append)

    for value, expected in zip(in_z(run, model, batch, "0"), exact(model, batch, "0"), strict=True):
        assert_close(value, expected)
    assert sum(told) == 6


def test_it_applies_where_samples_do_not_interact() -> None:
    facts = {"own_use": True, "samples_independent": True, "outputs": 6}
    assert output_basis.applies(Facts("0", 30, **facts))
    for name in facts:
        assert not output_basis.applies(Facts("0", 30, **{**facts, name: 0}))
    assert output_basis.products(Facts("0", 30, outputs=6), Budget()) == 6
    assert torch.is_grad_enabled()
