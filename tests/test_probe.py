"""The probe's life: accumulation, averages, every, pauses, checkpoints, and what is no training step."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from secorder import CurvatureProbe, InvalidArgumentError, ProbeStateError

from .helpers import data, make, reference, step
from .reference import assert_all_close, fisher_by_sample


def test_training_loop_is_left_alone_and_batches_of_different_size_are_averaged_over_samples() -> None:
    model, plain = make(), None
    plain = copy.deepcopy(model)
    probe = CurvatureProbe(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    total, seen = {}, 0
    for count in (6, 3, 1):
        batch = data(count)
        for name, value in reference(model, batch).items():
            total[name] = total.get(name, 0) + value * count
        seen += count
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            step(m, batch)
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert probe.num_samples == seen
    assert_all_close(probe.fisher_diagonal().by_parameter(), {k: v / seen for k, v in total.items()})


@pytest.mark.parametrize("sample_dim", [1, {"input": 1}], ids=["dimension", "mapping"])
def test_one_shot_measurements_take_samples_where_they_were_told_to_be(sample_dim: Any) -> None:
    """Before any training, of a model that goes by neither dimension; alone, and as a data set."""
    model, steps, targets = make(), torch.randn(5, 4, 4), torch.randn(5, 4, 3)
    expected = fisher_by_sample(model, F.mse_loss, steps, targets, 4, dim=1)
    with CurvatureProbe(model, sample_dim=sample_dim) as probe:
        assert_all_close(probe.fisher_diagonal(F.mse_loss, steps, targets).by_parameter(), expected)
        parts = zip(steps.split(2, 1), targets.split(2, 1), strict=True)
        assert_all_close(probe.fisher_diagonal(F.mse_loss, parts).by_parameter(), expected)
        assert probe.hessian_diagonal(F.mse_loss, steps, targets, method="exact").total > 0


@pytest.mark.parametrize("dims", [{"input": None}, {"input": 1, "other": 2}], ids=["none", "two"])
def test_samples_in_no_single_dimension_are_for_training_alone(dims: Any) -> None:
    batch = torch.randn(5, 4), torch.randn(5, 3)
    with CurvatureProbe(make(), sample_dim=dims) as probe:
        for measure in (probe.fisher_diagonal, probe.verify):
            with pytest.raises(InvalidArgumentError, match="from one dimension of the inputs"):
                measure(F.mse_loss, *batch)
        with pytest.raises(InvalidArgumentError, match="from one dimension of the inputs"):
            probe.hessian_diagonal(F.mse_loss, [batch, batch])  # which weights batches by samples
        assert probe.hessian_diagonal(F.mse_loss, *batch).total > 0


def test_paused_reset_detach_attach() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model)
    with probe.paused():
        step(model, batch)
    assert probe.num_samples == 0
    step(model, batch)
    assert probe.num_samples == 6
    probe.detach()
    probe.detach()
    step(model, batch)
    assert probe.num_samples == 6
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    with pytest.raises(ProbeStateError, match="detached"), probe.paused():
        pass
    probe.attach()
    with pytest.raises(ProbeStateError, match="attached already"):
        probe.attach()
    probe.reset()
    assert probe.num_samples == 0
    step(model, batch)
    assert probe.num_samples == 6


def test_two_probes_on_one_model_do_not_see_each_other() -> None:
    model, batch = make(), data()
    first, second = CurvatureProbe(model), CurvatureProbe(model, layers="0")
    step(model, batch)
    first.hessian_diagonal(F.cross_entropy, *batch)
    second.fisher_diagonal(F.cross_entropy, *batch)
    assert first.num_samples == second.num_samples == 6
    second.detach()
    step(model, batch)
    assert (first.num_samples, second.num_samples) == (12, 6)
    assert_all_close(first.fisher_diagonal().by_parameter(), reference(model, batch))
