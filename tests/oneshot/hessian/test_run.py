"""What was chosen is carried out, layer by layer."""

import pytest
import torch.nn.functional as F
from torch import nn

from secorder import InvalidArgumentError, Strategy
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.run import carry_out, on_parameters

from ...helpers import Clamped, Fn, Net, Twice, data, make, measured
from ...reference import assert_close
from .strategies import exact


def test_each_layer_goes_its_own_way_and_all_are_exact() -> None:
    model, batch = Net(lambda m, x: m.inner(x), inner=Twice(), spare=nn.Linear(2, 2)), data()
    found = measured(lambda task: carry_out(task, Budget("exact"), lambda values: values), model, batch)
    assert [(name, o.strategy) for name, o in found.items()] == [
        ("inner.a", Strategy.PARAMETER_BASIS),
        ("inner.b", Strategy.CHAIN),
        ("spare", Strategy.UNUSED),
    ]
    for name in ("inner.a", "inner.b"):
        for value, expected in zip(found[name].estimate.values, exact(model, batch, name), strict=True):
            assert_close(value.flatten(), expected)
    assert not any(v.any() for v in found["spare"].estimate.values)
    assert found["inner.a"].num_hvps >= 20
    assert found["spare"].num_hvps == 0


def test_only_what_is_wanted_is_kept() -> None:
    found = measured(
        lambda task: carry_out(task, Budget("exact"), lambda values: [sum(v.sum(1, keepdim=True) for v in values)]),  # type: ignore[list-item]
        make(),
        data(),
    )
    assert {o.estimate.values[0].shape for o in found.values()} == {(1,)}


def test_layers_that_columns_turn_out_not_to_serve_are_drawn() -> None:
    """A root's columns are clamped on their way back, smaller vectors are not."""
    model, batch = make(nn.Tanh(), nn.Linear(5, 5), Fn(Clamped.apply)), data()
    found = measured(lambda task: carry_out(task, Budget("hutchinson", 200), lambda v: v), model, batch)
    assert found["2"].strategy == Strategy.OUTPUT_DRAWS
    for value, error, true in zip(
        found["2"].estimate.values, found["2"].estimate.errors, exact(model, batch, "2"), strict=True
    ):
        assert ((value.flatten() - true).abs() <= 8 * error.flatten() + 1e-9).all()


def test_gradients_in_the_parameters_count_every_use() -> None:
    model, batch = Twice(), data()

    def work(task):  # type: ignore[no-untyped-def]
        assert on_parameters(task, []) == []
        return [[g.detach() for g in own] for _, own in on_parameters(task, task.layers)]

    found = measured(work, model, batch)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for own, layer in zip(found, (model.a, model.b), strict=True):
        assert_close(own[0], layer.weight.grad)
    with pytest.raises(InvalidArgumentError, match="does not depend"):
        measured(work, model, batch, lambda f, t: F.cross_entropy(f.detach(), t).requires_grad_())
