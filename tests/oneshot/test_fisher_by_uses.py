"""One-shot Fishers of parameters that no layer with a rule holds: none runs sample by sample."""

from typing import Any

import pytest

from secorder import CurvatureProbe

from ..cases import CASES
from ..helpers import run_again_where_nothing_tells
from ..reference import assert_all_close, ggn_by_sample
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
