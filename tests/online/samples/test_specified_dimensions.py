"""Where samples were told to be, in passes of our own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CouplingError, CurvatureProbe, InvalidArgumentError, per_layer_fisher_diagonal
from secorder.online.samples.specified_dimensions import specified_dimensions

from ...helpers import make
from ...reference import assert_all_close, fisher_by_sample


def test_specified_dimensions() -> None:
    assert specified_dimensions(2) == specified_dimensions({"x": 2, "mask": None}) == {2}
    assert specified_dimensions({"x": None}) == set()
    assert specified_dimensions(None) is specified_dimensions("list") is None


@pytest.mark.parametrize("dims", [{"inputs": 0}, {"input": 0, "mask": None}, {3: None}, {}])
def test_names_that_the_model_does_not_take_are_refused_at_once(dims: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"names .*the model's forward takes \['input'\]"):
        CurvatureProbe(make(), sample_dim=dims)
    if dims:
        CurvatureProbe(AnyNames(make()), sample_dim=dims).detach()


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


class AnyNames(nn.Sequential):
    def forward(self, input: Tensor, **other: Any) -> Tensor:
        return super().forward(input)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dims", [{"input": None}, {"input": 1, "other": 2}], ids=["none", "two"])
def test_samples_in_no_single_dimension_are_for_training_alone(dims: Any) -> None:
    batch = torch.randn(5, 4), torch.randn(5, 3)
    with CurvatureProbe(AnyNames(make()), sample_dim=dims) as probe:
        for measure in (probe.fisher_diagonal, probe.verify):
            with pytest.raises(InvalidArgumentError, match="from one dimension of the inputs"):
                measure(F.mse_loss, *batch)
        with pytest.raises(InvalidArgumentError, match="from one dimension of the inputs"):
            probe.hessian_diagonal(F.mse_loss, [batch, batch])  # which weights batches by samples
        assert probe.hessian_diagonal(F.mse_loss, *batch).total > 0


@pytest.mark.parametrize("by_name", [False, True])
def test_an_argument_that_samples_share_is_not_cut_where_it_was_told_of(by_name: bool) -> None:
    """A mask of as many rows as there are samples, which would be taken for theirs; and it is left as it was."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            mixed = self.layer(tokens).tanh().mT @ mask.mul_(0.5)
            return self.head(mixed.mean(-1))  # type: ignore[no-any-return]

    model, tokens, mask, labels = Masked(), torch.randn(5, 5, 3), torch.ones(5, 5).tril(), torch.arange(5) % 3

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t)

    inputs: Any = {"tokens": tokens, "mask": mask} if by_name else (tokens, mask)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(5):
        loss = loss_fn(model(tokens[n : n + 1], mask.clone()), labels[n : n + 1])
        for total, g in zip(expected.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += g**2 / 5
    with pytest.raises(CouplingError):
        per_layer_fisher_diagonal(model, loss_fn, inputs, labels)
    found = per_layer_fisher_diagonal(model, loss_fn, inputs, labels, sample_dim={"tokens": 0, "mask": None})
    assert_all_close(found.by_parameter(), expected)
    assert torch.equal(mask, torch.ones(5, 5).tril())
