"""The rules by operation, and the way for everything else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from secorder.errors import AttributionError, InvalidArgumentError, InvalidTypeError
from secorder.layers.layout import DIM_ZERO, Layout
from secorder.layers.operations import OPERATIONS, OperationCall, operation_rule, parameter_map, per_sample_gradient
from secorder.layers.operations.registry import MAPS

from ...helpers import Doubled
from .by_sample import assert_exact


def test_operations_without_a_rule_run_their_own_backward() -> None:
    x, w = torch.randn(4, 3), torch.randn(3)
    assert_exact(torch.hypot, x, w, ruled=False)
    assert_exact(torch.lerp, x, torch.randn(4, 3), w, index=2, ruled=False)
    assert_exact(torch.hypot, torch.randn(12, 3), w, layout=Layout(0, 3, False), ruled=False)


def test_a_rule_is_entered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPERATIONS, "HypotBackward0", raising=False)

    @operation_rule("HypotBackward0")
    def hypot(call: OperationCall, index: int) -> Tensor | None:
        own, z = call.saved("other" if index else "self"), call.saved("result")
        return call.of_samples(call.g * own / z, call.shape(index))

    try:
        assert_exact(torch.hypot, torch.randn(4, 3), torch.randn(3))
        with pytest.raises(InvalidArgumentError, match="has a rule already"):
            operation_rule("HypotBackward0")
    finally:
        del OPERATIONS["HypotBackward0"]
    with pytest.raises(InvalidArgumentError, match="name the nodes"):
        operation_rule()
    with pytest.raises(InvalidArgumentError, match="TBackward0 has a rule already"):
        parameter_map("TBackward0")


@pytest.mark.parametrize("enter", [operation_rule, parameter_map])
def test_rules_that_cannot_be_called(enter: Any) -> None:
    with pytest.raises(InvalidTypeError, match="the name of a node must be a string"):
        operation_rule(3)
    with pytest.raises(InvalidTypeError, match="a rule must be callable as"):
        enter("ErfinvBackward0")(5)
    assert "ErfinvBackward0" not in OPERATIONS.keys() | MAPS.keys()


def test_a_backward_of_the_users_own_is_not_run() -> None:
    z = Doubled.apply(torch.randn(3, requires_grad=True))
    with pytest.raises(AttributionError, match="DoubledBackward"):
        per_sample_gradient(OperationCall(z.grad_fn, [torch.ones(3)], [DIM_ZERO], 3, torch.float64), 0)
