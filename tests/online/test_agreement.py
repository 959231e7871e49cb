"""What ranks decide together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from secorder import CurvatureProbe
from secorder.online import agreement
from secorder.online.agreement import share_troubles
from secorder.online.reading import unreadable

from ..helpers import data, make, run_ranks, step


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_happens_on_one_rank_alone_stops_none_and_changes_no_number(ranks: int) -> None:
    run_ranks("differ", ranks)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_troubles_of_this_rank_stay_as_they_are() -> None:
    model: nn.Sequential = make()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, data())
        probe._fisher.troubles.marks["0"] = "as it happens"
        probe._fisher.failures.counts[1] += 5
        share_troubles(probe._fisher, None)
    assert probe._fisher.troubles.marks == {"0": "as it happens"}
    assert torch.equal(probe._fisher.failures.counts, torch.tensor([0, 5]))


@pytest.mark.usefixtures("one_process")
def test_what_is_doubted_on_this_rank_is_told_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[list[int]] = []

    def largest(own: torch.Tensor, group: Any) -> torch.Tensor:
        shared.extend(own.tolist())
        return own

    monkeypatch.setattr(agreement, "largest", largest)
    with CurvatureProbe(make(), reduction="mean") as probe:
        probe._fisher.doubts.expect(torch.tensor(5.0), 6, "a label does not count")
        share_troubles(probe._fisher, None)
        assert shared == [[0, 0], [1, 1]]
        assert unreadable(probe._fisher) == dict.fromkeys(("0", "2"), "a label does not count")
