"""Two and three real processes against one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from secorder import CurvatureProbe, ProbeStateError


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["passive", "averaged", "decay", "one_shot", "sharded", "tensor_parallel"])
def test_ranks_agree_with_one_process(case: str, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "tests.distributed_worker", case]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == ranks


def test_without_a_process_group() -> None:
    probe = CurvatureProbe(nn.Linear(3, 2))
    with pytest.raises(ProbeStateError, match="init_process_group"):
        probe.synchronize()
    assert torch.distributed.is_available()
