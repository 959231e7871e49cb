"""Two and three real processes against one."""

from typing import Any

import pytest
import torch
from torch import nn

from secorder import CurvatureProbe, ProbeStateError
from secorder.parallel.all_reduce import raised_on_all

from ..helpers import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["online", "windows", "norms", "averaged", "decay", "one_shot"])
def test_ranks_agree_with_one_process(case: str, ranks: int) -> None:
    run_ranks(case, ranks)


@pytest.mark.slow
def test_what_raises_on_one_rank_raises_on_all() -> None:
    run_ranks("differ_one_shot", 2)


def test_an_error_inside_goes_on_as_it_is(mesh: Any) -> None:
    with pytest.raises(KeyError), raised_on_all():
        raise KeyError
    with raised_on_all():
        pass


def test_without_a_process_group() -> None:
    probe = CurvatureProbe(nn.Linear(3, 2))
    with pytest.raises(ProbeStateError, match="init_process_group"):
        probe.synchronize()
    assert torch.distributed.is_available()
