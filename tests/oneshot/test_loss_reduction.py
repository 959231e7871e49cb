"""Batches make up a data set as the loss reduces samples: found of each batch, whatever its loss is worth."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError, diagnose, per_layer_hessian_diagonal

from ..reference import assert_all_close, hessian_by_element

TOKENS = torch.randn(17, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(17 * 4).view(17, 4) % 3


class Tagger(nn.Module):
    """Classes in dim 1, as cross entropy takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        nn.init.normal_(self.layer.weight, std=1e-4)  # untrained: every token's loss is nearly log 3

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens).transpose(1, 2)  # type: ignore[no-any-return]


def own(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f, t)


def own_sum(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f, t, reduction="sum")


def batches(labels: Tensor) -> Any:
    return list(zip(TOKENS.split(5), labels.split(5), strict=True))


@pytest.mark.parametrize("loss_fn", [own, F.cross_entropy], ids=["own", "defined"])
@pytest.mark.parametrize("row", [0, 7], ids=["first", "late"])
def test_a_mean_over_tokens_is_none_over_samples(loss_fn: Any, row: int) -> None:
    padded = LABELS.clone()
    padded[row, 1:] = -100
    with CurvatureProbe(Tagger()) as probe:
        for measure in (probe.hessian_diagonal, probe.hessian_trace, probe.hessian_eigenvalues):
            with pytest.raises(InvalidArgumentError, match="neither a mean nor a sum"):
                measure(loss_fn, batches(padded))
    with pytest.raises(InvalidArgumentError, match="neither a mean nor a sum"):
        diagnose(Tagger(), loss_fn, batches(padded))
    assert diagnose(Tagger(), loss_fn, batches(padded), reduction="mean").num_samples == 17


def test_a_loss_that_reduces_a_later_batch_otherwise() -> None:
    kinds = ["mean"]

    def changing(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t, reduction=kinds[-1])

    def data() -> Iterator[Any]:
        yield from batches(LABELS)[:2]
        kinds.append("sum")
        yield from batches(LABELS)[2:]

    with CurvatureProbe(Tagger()) as probe, pytest.raises(InvalidArgumentError, match="neither a mean nor a sum"):
        probe.hessian_trace(changing, data())


@pytest.mark.parametrize("loss_fn", [own, own_sum], ids=["mean", "sum"])
def test_whole_and_padded_batches(loss_fn: Any) -> None:
    labels = LABELS.clone()
    if loss_fn is own_sum:
        labels[7, 1:] = -100
    model = Tagger()
    expected = hessian_by_element(model, loss_fn, TOKENS, labels)
    assert_all_close(per_layer_hessian_diagonal(model, loss_fn, batches(labels)).by_parameter(), expected)
    assert_all_close(diagnose(model, loss_fn, batches(labels)).hessian.by_parameter(), expected)


def test_what_the_model_does_in_training_is_not_the_loss_reducing() -> None:
    """Dropout, and statistics of a batch, of which one sample has none."""
    for layer in (nn.Dropout(), nn.BatchNorm1d(4)):
        model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 3)).double()
        found = per_layer_hessian_diagonal(model, own, zip(TOKENS[:, 0].split(5), LABELS[:, 0].split(5), strict=True))
        assert found.info["0"].num_batches == 4
        assert model[1].training


def test_half_precision_is_told_to_its_own_rounding() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).float()
    parts = list(zip(TOKENS[:, 0].float().split(5), LABELS[:, 0].split(5), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert per_layer_hessian_diagonal(model, own, parts).info["0"].num_batches == 4
    halves = [(x.bfloat16(), t) for x, t in parts]
    assert per_layer_hessian_diagonal(model.bfloat16(), own, halves).info["0"].num_batches == 4
    model = model.float()
    for scale in (1, 2, 3, 4):  # a loss of fewer digits than the model's
        found = per_layer_hessian_diagonal(model, lambda f, t, n=scale: own(f.bfloat16() * n, t), parts)
        assert found.info["0"].num_batches == 4


def test_losses_that_go_by_more_than_the_output() -> None:
    """A loss that the model returns, one that holds its weights, and one of outputs that differ in training mode."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.dropout = nn.Linear(3, 3).double(), nn.Dropout()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.layer(self.dropout(x))
            return F.cross_entropy(logits, labels) if labels is not None else [logits, 2 * logits][: 1 + self.training]

    model, tokens, labels = Model(), TOKENS[:, 0].split(5), LABELS[:, 0].split(5)
    returned = [{"x": x, "labels": t} for x, t in zip(tokens, labels, strict=True)]
    pairs = list(zip(tokens, labels, strict=True))

    def penalized(f: Any, t: Tensor) -> Tensor:
        return F.cross_entropy(f[0], t, reduction="sum") + model.layer.weight.square().sum()

    found = per_layer_hessian_diagonal(model, lambda f, t: f, returned)
    assert found.info["layer"].num_batches == 4
    assert per_layer_hessian_diagonal(model, lambda f, t: own(f[0], t) + own(f[1], t), pairs).total > 0
    with CurvatureProbe(model) as probe, pytest.raises(InvalidArgumentError, match="neither a mean nor a sum"):
        probe.hessian_diagonal(penalized, pairs)  # which would be added up once for each batch


def test_graphs_are_cut_by_their_nodes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()

        def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
            hidden = torch.tanh(self.inner(nodes))
            return self.outer(hidden.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, hidden))  # type: ignore[no-any-return]

    def graphs() -> Any:
        for count in (4, 5):
            graph = torch.arange(count).repeat_interleave(torch.arange(1, count + 1))
            yield (TOKENS.flatten(0, 1)[: len(graph)], graph), LABELS[:count, 0]

    assert per_layer_hessian_diagonal(Net(), own, graphs()).info["inner"].num_batches == 2


def test_where_nothing_tells() -> None:
    def fitted(f: Tensor, t: Tensor) -> Tensor:
        return (f - f.detach()).square().mean()  # neither loss nor gradient

    with CurvatureProbe(Tagger()) as probe, pytest.raises(InvalidArgumentError, match="cannot be determined"):
        probe.hessian_diagonal(fitted, batches(LABELS))
    with CurvatureProbe(Tagger(), reduction="mean") as probe:
        assert probe.hessian_diagonal(fitted, batches(LABELS)).total > 0
