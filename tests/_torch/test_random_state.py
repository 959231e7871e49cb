"""The global random state, of torch, Python and NumPy, is taken and set as a whole."""

import os
import random
import signal
import threading
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import nn

from secorder._torch.random_state import (
    cuda_devices,
    fresh_generator,
    get_random_state,
    one_at_a_time,
    same_beside_torch,
    same_random_state,
    set_random_state,
)


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), numpy.random.rand()


def test_draws_are_repeated() -> None:
    devices = cuda_devices(nn.Linear(2, 2))
    assert devices == []
    state = get_random_state(devices)
    first = draw()
    assert draw() != first
    set_random_state(state, devices)
    assert draw() == first


@pytest.mark.parametrize(
    "draws", [lambda: torch.rand(()), random.random, numpy.random.rand], ids=["torch", "python", "numpy"]
)
def test_a_draw_of_any_kind_is_seen(draws: Callable[[], object]) -> None:
    state = get_random_state([])
    assert same_random_state(state, get_random_state([]))
    draws()
    assert not same_random_state(state, get_random_state([]))


def test_that_of_torch_alone_leaves_the_others_as_they_are() -> None:
    state = get_random_state([], of_torch=True)
    assert (state.python, state.numpy) == (None, None)
    first, *_ = draw()
    now = get_random_state([])
    set_random_state(state, [])
    assert same_beside_torch(now, get_random_state([]))
    assert not same_random_state(now, get_random_state([]))
    assert torch.rand(()).item() == first


def test_a_draw_on_a_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device = torch.zeros(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: on_device.clone())
    state = get_random_state([0])
    assert same_random_state(state, get_random_state([0]))
    on_device += 1
    assert not same_random_state(state, get_random_state([0]))


def test_generators_of_our_own_draw_apart_from_it() -> None:
    state = get_random_state([])
    one, other = fresh_generator(), fresh_generator()
    assert torch.rand(3, generator=one).tolist() != torch.rand(3, generator=other).tolist()
    assert same_random_state(state, get_random_state([]))


def ends_well_in_a_child() -> bool:
    """Whether a child process gets what one thread at a time has, and gives it back."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1] == 0
    signal.alarm(20)  # which ends it
    try:
        with one_at_a_time(), one_at_a_time():
            os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_waits_for_no_thread_of_its_parent() -> None:
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with one_at_a_time():
            entered.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    try:
        assert ends_well_in_a_child()
    finally:
        done.set()
        thread.join()
    with one_at_a_time():
        assert ends_well_in_a_child()
