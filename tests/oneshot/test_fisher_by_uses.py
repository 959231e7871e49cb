"""One-shot Fishers of parameters that no layer with a rule holds: none runs sample by sample."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.oneshot import fisher_by_uses as by_uses_of

from ..cases import CASES
from ..helpers import run_again_where_nothing_tells, seed
from ..reference import assert_all_close, fisher_by_sample, ggn_by_sample
from ..test_matrix import brute_force, build

NAMES = ("operations/conv1d", "operations/dora", "operations/relative_bias", "operations/cross_attention")


@run_again_where_nothing_tells
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["empirical", "type-2"])
def test_by_operations(name: str, kind: Any) -> None:
    case = next(case for case in CASES if case.name == name)
    model, loss_fn, inputs, targets = build(case)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        found = probe.fisher_diagonal(loss_fn, inputs, targets, fisher_type=kind)
    assert {info.strategy for info in found.info.values()} == {"rule"}
    if kind == "empirical":
        assert_all_close(found.by_parameter(), brute_force(case, "fisher"))
    else:
        assert_all_close(found.by_parameter(), ggn_by_sample(model, loss_fn, inputs, targets))


def test_one_forward_and_one_backward_pass_are_all() -> None:
    """Of a table that all samples share, too, and of parameters that no module with a rule holds."""
    seed()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
            self.gain = nn.Parameter(torch.randn(4))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.words(ids) + self.places(torch.arange(5))[None])
            found: Tensor = self.head((x * self.gain).tanh().mean(1))
            return found

    model, ids, targets = Model().double(), torch.randint(9, (6, 5)), torch.randint(3, (6,))
    calls: list[str] = []
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    counted = mock.patch.object(by_uses_of, "gradients_at", side_effect=by_uses_of.gradients_at)
    with CurvatureProbe(model, "all") as probe, counted as passes:
        found = probe.fisher_diagonal(F.cross_entropy, ids, targets)
    assert (calls, passes.call_count) == (["forward"], 1)
    assert_all_close(found.by_parameter(), fisher_by_sample(model, F.cross_entropy, ids, targets, 6))
