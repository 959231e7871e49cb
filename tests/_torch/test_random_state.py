"""The global random state, of torch, Python and NumPy, is taken and set as a whole."""

import random

import numpy
import torch
from torch import nn

from secorder._torch.random_state import cuda_devices, get_random_state, set_random_state


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
