"""Two and three real processes against one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from secorder import CurvatureProbe, ProbeStateError
from secorder.parallel import all_reduce
from secorder.parallel.all_reduce import raised_on_all

from ..helpers import data, mlp, run_ranks, step
from ..reference import assert_all_close


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["online", "windows", "other_ranks", "norms", "averaged", "decay", "one_shot"])
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


@pytest.mark.parametrize("model", [mlp().float(), nn.Linear(3, 2).float()])
def test_what_is_sent(model: nn.Module, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/scaling.md says: 4 P + 96 L + 16 bytes."""
    sent: list[int] = []
    monkeypatch.setattr(all_reduce, "all_reduce", lambda t, **_: sent.append(t.numel() * t.element_size()))
    probe = CurvatureProbe(model)
    probe.synchronize()
    assert sum(sent) == 4 * sum(p.numel() for p in model.parameters()) + 96 * len(probe.layer_names) + 16
    assert len(sent) == 4


def test_without_a_process_group() -> None:
    probe = CurvatureProbe(nn.Linear(3, 2))
    with pytest.raises(ProbeStateError, match="init_process_group"):
        probe.synchronize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL is of CUDA devices")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_group_that_knows_no_host_memory(where: str, tmp_path: Path) -> None:
    model, (inputs, targets) = mlp().cuda(), data()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with CurvatureProbe(model, accumulator_device=where) as probe:
            step(model, (inputs.cuda(), targets.cuda()))
            before = probe.fisher_diagonal()
            probe.synchronize()
            assert_all_close(probe.fisher_diagonal(), before)
    finally:
        dist.destroy_process_group()
