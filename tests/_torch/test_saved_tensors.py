"""Tensors that autograd saves for backward."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from secorder._torch.saved_tensors import is_overwritten_error, saved_tensor_hooks_active


@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_on_saved_tensors_are_seen(reentrant: bool) -> None:
    assert not saved_tensor_hooks_active()
    with torch.autograd.graph.save_on_cpu():
        assert saved_tensor_hooks_active()
    found: list[bool] = []

    def inner(x: Tensor) -> Tensor:
        found.append(saved_tensor_hooks_active())
        return x.sin()

    checkpoint(inner, torch.ones(2, requires_grad=True), use_reentrant=reentrant)
    assert found == [not reentrant]  # a reentrant one runs without gradients, and saves nothing


def test_an_overwritten_tensor_is_told_from_a_graph_that_was_freed() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x.sin()
    z = y.exp()
    z.add_(1)
    with pytest.raises(RuntimeError) as overwritten:
        z.sum().backward()
    assert is_overwritten_error(overwritten.value)
    y = x.sin().sum()
    y.backward()
    with pytest.raises(RuntimeError) as freed:
        y.backward()
    assert not is_overwritten_error(freed.value)
