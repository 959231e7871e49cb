"""Small models and steps that many tests share."""

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reference import fisher_by_sample


class Shared(nn.Module):
    """A layer sees one row for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.shift = nn.Linear(4, 3), nn.Linear(2, 3)
        self.condition = nn.Parameter(torch.randn(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * self.shift(self.condition)


#: Before 2.7, PyTorch's fully_shard gathers parameters by what the streams of a CPU do not have.
FULLY_SHARD_RUNS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


def make() -> nn.Sequential:
    """A smooth classifier, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(count: int = 6) -> tuple[Tensor, Tensor]:
    """A batch for it."""
    return torch.randn(count, 4), torch.randint(3, (count,))


def step(model: nn.Module, batch: tuple[Tensor, Tensor], scale: float = 1.0) -> None:
    """Forward and backward of one batch."""
    (F.cross_entropy(model(batch[0]), batch[1]) * scale).backward()


def reference(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Its empirical Fisher by brute force."""
    return fisher_by_sample(model, F.cross_entropy, *batch, len(batch[0]))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def run_ranks(case: str, ranks: int) -> None:
    """A case of :mod:`tests.distributed_worker` in real processes, all of which must agree with one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "tests.distributed_worker", case]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("agrees") == ranks
