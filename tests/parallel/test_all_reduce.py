"""Two and three real processes against one."""

import pytest
import torch
from torch import nn

from secorder import CurvatureProbe, ProbeStateError

from ..helpers import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["online", "windows", "norms", "averaged", "decay", "one_shot"])
def test_ranks_agree_with_one_process(case: str, ranks: int) -> None:
    run_ranks(case, ranks)


def test_without_a_process_group() -> None:
    probe = CurvatureProbe(nn.Linear(3, 2))
    with pytest.raises(ProbeStateError, match="init_process_group"):
        probe.synchronize()
    assert torch.distributed.is_available()
