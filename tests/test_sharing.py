"""Parameters that several layers hold count once in what is told of all layers together."""

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureRecorder, Diagonals, report
from secorder._sharing import counted_once, held_before

from .helpers import seed
from .reference import gradients_by_sample, hessian_by_element


def test_layers_that_are_together_all_parameters() -> None:
    a, b, c = object(), object(), object()
    assert counted_once({"words": [a], "norm": [b], "head": [a, c]}) == ["norm", "head"]
    assert counted_once({"one": [a, b], "other": [a, c]}) == ["one", "other"]
    assert counted_once({"one": [a], "same": [a], "empty": []}) == ["one", "empty"]
    assert held_before({"words": {"words.weight": a}, "head": {"head.weight": a, "head.bias": c}}) == {
        "head": ["head.weight"]
    }


class LanguageModel(nn.Module):
    """Words, and a head that is tied to them."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.hidden(self.words(ids).mean(1))))
        return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_totals_of_a_model_with_a_tied_head(accumulate: Any, bias: bool) -> None:
    seed()
    model, ids, targets = LanguageModel(bias=bias).double(), torch.randint(5, (6, 4)), torch.randint(5, (6,))
    count, names = len(ids), dict(model.named_parameters())
    gradients = gradients_by_sample(model, F.cross_entropy, ids, targets, count)
    rows = torch.cat([gradients[name].reshape(count, -1) for name in names], 1)
    each, batch = rows.square().sum(1).mean(), rows.mean(0).square().sum()
    with CurvatureProbe(model, "all", reduction="mean", accumulate=accumulate) as probe:
        F.cross_entropy(model(ids), targets).backward()
        total = probe.gradient_noise_scale().total
        hessian = probe.hessian_diagonal(F.cross_entropy, ids, targets)
    assert total.squared_norm == pytest.approx(float((count * batch - each) / (count - 1)), rel=1e-9)
    assert total.variance == pytest.approx(float((each - batch) * count / (count - 1)), rel=1e-9)
    expected = hessian_by_element(model, F.cross_entropy, ids, targets)
    trace = float(sum(expected[name].sum() for name in names))
    for told in (hessian, pickle.loads(pickle.dumps(hessian)), Diagonals.from_state_dict(hessian.state_dict())):
        assert told.total == pytest.approx(trace, rel=1e-9)
    assert (hessian + hessian).total == pytest.approx(2 * trace, rel=1e-9)
    assert hessian.shares()["hidden"] == pytest.approx(float(hessian["hidden"].sum()) / trace, rel=1e-9)
    last = str(report(hessian=hessian, depth=1)).splitlines()[-2:]
    number = sum(p.numel() for p in model.parameters()) + (15 if bias else 0)  # a head with a bias of its own counts
    assert any(line.replace("│", " ").split()[:2] == ["total", str(number)] for line in last)
    if accumulate == "diagonal":
        assert probe.fisher_diagonal().total == pytest.approx(float(each), rel=1e-9)


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_what_is_logged_of_the_whole_model(accumulate: Any) -> None:
    seed()
    model, ids, targets = LanguageModel(bias=True).double(), torch.randint(5, (6, 4)), torch.randint(5, (6,))
    gradients = gradients_by_sample(model, F.cross_entropy, ids, targets, 6)
    trace = float(sum(gradients[name].square().sum() for name, _ in model.named_parameters())) / 6
    with CurvatureProbe(model, "all", reduction="mean", accumulate=accumulate) as probe:
        recorder = CurvatureRecorder(probe, [], log_every=1)
        F.cross_entropy(model(ids), targets).backward()
        recorder.step()
    ((_, told),) = recorder.history.points("model")
    assert told["fisher_trace"] == pytest.approx(trace, rel=1e-9)
