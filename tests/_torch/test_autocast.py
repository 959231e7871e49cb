"""Autocast is taken from the caller, and put on for the user's code alone."""

import torch

from secorder._torch.autocast import autocast, autocast_state, no_autocast, under_autocast


def product() -> torch.dtype:
    a = torch.ones(2, 2, dtype=torch.float32)
    return (a @ a).dtype


def test_a_state_is_taken_and_put_on_again() -> None:
    assert autocast_state() == {}
    with torch.autocast("cpu", torch.bfloat16):
        state = autocast_state()
        assert state == {"cpu": torch.bfloat16}
        with no_autocast():
            assert product() is torch.float32
        assert product() is torch.bfloat16
    assert product() is torch.float32
    with autocast(state):
        assert product() is torch.bfloat16


def test_a_function_remembers_the_state_it_was_made_in() -> None:
    assert under_autocast(product) is product
    with torch.autocast("cpu", torch.bfloat16):
        later = under_autocast(product)
    assert later() is torch.bfloat16
    assert later.__wrapped__ is product
