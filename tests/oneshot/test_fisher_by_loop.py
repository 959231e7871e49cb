"""The Fisher by definition, and the check that the batch is made of its samples."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder import CouplingError, InvalidArgumentError, NonFiniteError, per_layer_fisher_diagonal
from secorder.oneshot.fisher_by_loop import by_loop
from secorder.oneshot.fisher_pairs import Asked
from secorder.oneshot.measurement import Measurement

from ..helpers import Net, by_layer, data, make, measured
from ..reference import assert_all_close, assert_close, fisher_by_sample, ggn_by_sample


def loop(fisher_type: Any = "empirical", loss_fn: Any = F.cross_entropy, batch: Any = None) -> Any:
    def work(task: Measurement) -> Any:
        return {name: values for name, (values, _) in by_loop(task, task.layers, Asked(fisher_type, 3)).items()}

    return measured(work, make(), batch or data(), loss_fn)


@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
def test_it_is_the_loop_over_samples(fisher_type: Any) -> None:
    batch, model = data(), make()
    brute = (
        fisher_by_sample(model, F.cross_entropy, *batch, 6)
        if fisher_type == "empirical"
        else ggn_by_sample(model, F.cross_entropy, *batch)
    )
    for layer, values in loop(fisher_type, batch=batch).items():
        for found, expected in zip(values, by_layer(model, brute, layer), strict=True):
            assert_close(found, expected)


def test_a_batch_that_is_not_made_of_its_samples_is_refused() -> None:
    def coupled(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f - f.mean(0), t)

    weights = torch.rand(7)

    def held(f: Tensor, t: Tensor) -> Tensor:
        return (F.cross_entropy(f, t, reduction="none") * weights[: len(f)]).mean()

    with pytest.raises(CouplingError, match="is not made of the losses"):
        loop(loss_fn=coupled)
    with pytest.raises(CouplingError, match="in another order, inputs and targets together"):
        loop(loss_fn=held)
    weights = weights[:6]
    with pytest.raises(CouplingError, match="fail on another one of 7"):
        loop(loss_fn=held)
    with pytest.raises(NonFiniteError, match=r"the loss of sample 0 alone is inf, though that of the batch is finite"):
        loop(loss_fn=lambda f, t: F.cross_entropy(f, t) / (len(f) - 1))


def test_second_order_needs_a_loss_of_the_output() -> None:
    model = make()

    def penalised(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + model[0].weight.square().sum()  # type: ignore[union-attr,operator]

    with pytest.raises(InvalidArgumentError, match="loss_fn computes from the model's output"):
        measured(lambda task: by_loop(task, task.layers, Asked("type-2")), model, data(), penalised)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_loss_that_the_model_takes_by_fewer_digits(kind: torch.dtype) -> None:
    batch, body = data(), make()
    model = Net(lambda m, x, y: F.cross_entropy(m.body(x).to(kind), y), body=body)
    found = per_layer_fisher_diagonal(model, lambda loss, _: loss, batch).by_parameter()
    assert_all_close(found, fisher_by_sample(model, lambda loss, _: loss, batch, None, 6))

    def standardised(m: Net, x: Tensor, y: Tensor) -> Tensor:
        f = m.body(x)
        return F.cross_entropy((f / (0.1 + f.detach().std(0, correction=0))).to(kind), y)

    model.function = standardised
    with pytest.raises(CouplingError):
        per_layer_fisher_diagonal(model, lambda loss, _: loss, batch)
