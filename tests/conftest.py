"""Every test starts from the same random state, in float64, and computes in one thread."""

import gc
from collections.abc import Iterator

import pytest
import torch

from .helpers import seed

# The models are too small for two: their threads only wait for each other, and for every other process of the machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _settled_heap() -> None:
    """What was loaded by now is not looked at again by the tests that count, again and again, what lives."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded_double() -> Iterator[None]:
    seed()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
