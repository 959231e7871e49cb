"""What is done before a backward pass begins."""

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder._torch.beginning import before_backward, tells_beginnings


class Owner:
    """Something that a graph keeps alive."""


def test_it_is_told_by_this_pytorch() -> None:
    assert tells_beginnings()


def test_the_next_backward_is_told_of_with_its_graph_and_no_other() -> None:
    entry, owner, seen = torch.autograd._engine_run_backward, Owner(), []
    x = torch.randn(3, requires_grad=True)

    def work(own: Any, ends: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> bool:
        assert own is owner
        seen.append(float(ends[0].detach()))
        assert ends[0].grad_fn is not None
        assert torch.equal(ends[0].grad_fn.next_functions[0][0]._saved_self, x)  # not freed yet
        return len(seen) == 2

    before_backward(owner, work, None)
    torch.autograd.grad(x.square().sum(), x)  # accumulates nothing
    assert not seen
    for _ in range(3):
        x.square().sum().backward()
    assert seen == [float(x.detach().square().sum())] * 2
    assert torch.autograd._engine_run_backward is entry
    assert torch.allclose(x.grad, 6 * x)


def test_what_waits_ends_with_its_owner() -> None:
    entry, owner = torch.autograd._engine_run_backward, Owner()
    before_backward(owner, lambda *_: pytest.fail("nobody waits"), None)
    assert torch.autograd._engine_run_backward is not entry
    del owner
    gc.collect()
    assert torch.autograd._engine_run_backward is entry
    torch.randn(2, requires_grad=True).sum().backward()


def test_another_that_takes_the_place_meanwhile_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, calls = Owner(), []
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", torch.autograd._engine_run_backward)  # put back at last
    before_backward(owner, lambda *_: bool(calls.append("ours")) or True, None)
    ours = torch.autograd._engine_run_backward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append("theirs")
        return ours(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", theirs)
    for _ in range(2):
        torch.randn(2, requires_grad=True).sum().backward()
    assert calls == ["theirs", "ours", "theirs"]
    assert torch.autograd._engine_run_backward is theirs
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", ours)
    before_backward(owner, lambda *_: True, None)
    torch.randn(2, requires_grad=True).sum().backward()
    assert torch.autograd._engine_run_backward is not ours
