"""Every test starts from the same random states, its own and the probe's, in float64, and computes in one thread."""

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from secorder._torch import random_state

from .helpers import seed

#: Tests that say something of a device as well: all others stay on the CPU.
ON_ANY_DEVICE = {
    "test_matrix",
    "test_exactness",
    "test_guest",
    "test_fisher",
    "test_compile",
    "test_trace",
    "test_noise",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device``: where the matrix, guest, accumulating and compiling tests make their tensors."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help="device of the tests that go for any; CUDA where there is one")


# The models are too small for two: their threads only wait for each other, and for every other process of the machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _settled_heap() -> None:
    """What was loaded by now is not looked at again by the tests that count, again and again, what lives."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _exact_device(request: pytest.FixtureRequest) -> None:
    """Random numbers of a device can only be seeded when it is in use; and float32 is held to its own rounding."""
    torch.zeros(1, device=request.config.getoption("--device"))
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seeded_double(request: pytest.FixtureRequest) -> Iterator[None]:
    seed()
    of_the_system, random_state.seeds = random_state.seeds, random.Random(0)
    torch.set_default_dtype(torch.float64)
    device = request.config.getoption("--device")
    elsewhere = device != "cpu" and request.path.stem in ON_ANY_DEVICE
    if elsewhere:
        torch.set_default_device(device)
    yield
    random_state.seeds = of_the_system
    if elsewhere:
        torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A device mesh of one rank, this process."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
