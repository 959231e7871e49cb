"""Copies to the host that are waited for when they are needed."""

import pytest
import torch

from secorder._torch.host_copy import at_hand, begin_copy, goes_to_host


def test_only_what_leaves_an_accelerator() -> None:
    assert not goes_to_host(torch.zeros(1), torch.zeros(1))
    assert not goes_to_host(torch.zeros(1, device="meta"), torch.zeros(1))


def test_at_hand_is_what_nobody_waits_for() -> None:
    assert at_hand([torch.tensor(1.0), torch.tensor(2.0)]) == [1.0, 2.0]
    assert at_hand([torch.zeros((), device="meta")]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a CUDA device")
def test_what_is_copied_is_what_was_there_then() -> None:
    started = torch.randn(1 << 20, device="cuda")
    expected = started.cpu()
    arrived = begin_copy(started)
    del started
    torch.full((1 << 20,), torch.nan, device="cuda")  # which may take its memory
    assert torch.equal(arrived(), expected)
    assert arrived().is_pinned()
