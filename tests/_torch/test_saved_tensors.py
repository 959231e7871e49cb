"""Tensors that autograd saves for backward."""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from secorder._torch.saved_tensors import (
    Kept,
    OverwrittenError,
    checkpoint_section,
    keep,
    saved_tensor_hooks_active,
    surrounded_as_usual,
)


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


def test_what_is_not_as_usual_around_a_call() -> None:
    assert surrounded_as_usual()
    unusual: list[AbstractContextManager[object]] = [
        torch.no_grad(), torch.autocast("cpu"), torch.autograd.graph.save_on_cpu(), torch.inference_mode(),
    ]  # fmt: skip
    for around in unusual:
        with around:
            assert not surrounded_as_usual()
    found: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: found.append(surrounded_as_usual()))  # where gradients are off
    checkpoint(lambda t: (found.append(surrounded_as_usual()), t.sin())[1], x, use_reentrant=True).sum().backward()
    assert found == [False, False, False]


@pytest.mark.parametrize("hooks", [nullcontext, torch.autograd.graph.save_on_cpu])
def test_what_is_kept_comes_back_or_was_overwritten(hooks: Callable[[], AbstractContextManager[None]]) -> None:
    x, y = torch.randn(3, requires_grad=True), torch.randn(2)
    with hooks():
        kept = keep([x, y])
    gc.collect()
    for tensor, expected in zip(kept.tensors(), (x, y), strict=True):
        assert torch.equal(tensor, expected)
        assert not tensor.requires_grad
    alive = weakref.ref(kept)
    del kept
    assert alive() is None


def test_what_was_overwritten_is_told() -> None:
    for away in (True, False):  # as autograd keeps it, and here
        y = torch.randn(2)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if away else nullcontext():
            kept = keep([y])
        y.add_(1)
        if away:  # such hooks take over the check: what they give back is what counts
            assert torch.equal(kept.tensors()[0], y)
        else:
            with pytest.raises(OverwrittenError):
                kept.tensors()


def test_a_checkpoint_frees_and_recomputes_what_is_kept() -> None:
    found: list[Kept] = []

    def inner(x: Tensor) -> Tensor:
        z = x.sin()
        found.append(keep([z]))
        return z.exp()

    x = torch.randn(3, requires_grad=True)
    y = checkpoint(inner, x, use_reentrant=False)
    before = len(found)
    y.register_hook(lambda g: found.append(torch.equal(found[0].tensors()[0], x.sin())))  # type: ignore[arg-type]
    y.sum().backward()
    assert len(found) > before + 1, "nothing was recomputed"
    assert found[-1] is True


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_section_that_is_computed_again_is_the_one_that_was_computed(use_reentrant: bool) -> None:
    seen = []

    def section(x: torch.Tensor) -> torch.Tensor:
        seen.append(checkpoint_section())
        return x.sin().sin()

    x = torch.randn(3, requires_grad=True)
    one, other = (checkpoint(section, x, use_reentrant=use_reentrant) for _ in range(2))
    assert checkpoint_section() is None
    (one + other).sum().backward()
    with torch.autograd.graph.save_on_cpu():
        assert checkpoint_section() is None
    first, second, *again = seen
    assert len(again) == 2
    if use_reentrant:
        assert seen == [None] * 4
    else:
        assert first is not None
        assert first is not second
        assert {id(a) for a in again} == {id(first), id(second)}
