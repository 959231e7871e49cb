"""An operation as its node knows it."""

import torch

from secorder.layers.layout import DIM_ZERO, Layout
from secorder.layers.operations import OperationCall


def test_saved_tensors_come_without_history_and_in_the_dtype_that_is_computed_in() -> None:
    x, w = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    z = torch.tanh(w) * x
    call = OperationCall(z.grad_fn, [torch.randn_like(z)], [DIM_ZERO], 4, torch.float32)
    assert call.g.dtype == call.saved("other").dtype == torch.float32
    assert call.shape(0) == (3,)


def test_sums_over_what_was_broadcast() -> None:
    z = torch.randn(3, 4, 5, requires_grad=True) * 2
    call = OperationCall(z.grad_fn, [torch.ones_like(z)], [Layout(1)], 4, z.dtype)
    assert torch.equal(call.of_samples(call.g, (3, 1, 1)), torch.full((4, 3, 1, 1), 5.0))
    assert torch.equal(call.of_samples(call.g, ()), torch.full((4,), 15.0))
    assert call.of_samples(call.g, (4, 1)) is None
