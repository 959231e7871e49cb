"""Reentrant checkpoints as plain calls."""

import threading

import torch
from torch import nn
from torch.utils import checkpoint

from secorder._torch.checkpoint import plain_checkpoints


def test_reentrant_checkpoints_run_as_plain_calls_in_this_thread_alone() -> None:
    block, x = nn.Linear(2, 2), torch.randn(3, 2, requires_grad=True)
    kind = checkpoint.CheckpointFunction
    names: list[str] = []

    def other_thread() -> None:
        names.append(type(checkpoint.checkpoint(block, x, use_reentrant=True).grad_fn).__name__)

    with plain_checkpoints():
        output = checkpoint.checkpoint(block, x, use_reentrant=True)
        assert type(output.grad_fn).__name__ == "AddmmBackward0"
        (g,) = torch.autograd.grad(output.square().sum(), block.weight, create_graph=True)
        assert torch.autograd.grad(g.sum(), block.weight)[0].abs().sum() > 0
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert checkpoint.CheckpointFunction is kind
    assert names == ["CheckpointFunctionBackward"]


def test_it_is_put_back_after_an_exception() -> None:
    kind = checkpoint.CheckpointFunction
    try:
        with plain_checkpoints():
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert checkpoint.CheckpointFunction is kind
