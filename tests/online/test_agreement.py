"""What ranks decide together."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from secorder import AttributionError, CurvatureProbe
from secorder.online.agreement import agree, give_up, share_troubles
from secorder.parallel.ranks import Ranks

from ..helpers import data, make, run_ranks, step


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_happens_on_one_rank_alone_stops_none_and_changes_no_number(ranks: int) -> None:
    run_ranks("differ", ranks)


class Two(Ranks):
    """This rank and another one, which says the same but for what it is told to say."""

    def largest(self, numbers: list[float]) -> list[float]:
        return [max(pair) for pair in zip(numbers, self.other, strict=True)]  # type: ignore[attr-defined]


def other(*says: float) -> Two:
    ranks = Two((), ())
    object.__setattr__(ranks, "other", list(says))
    return ranks


def test_a_bad_part_is_bad_for_all_and_a_missing_one_is_told() -> None:
    number = 3632233996  # of "test" by CRC-32
    assert not agree(other(0, 0, number, -number), "test", bad=False)
    assert agree(other(1, 0, number, -number), "test", bad=False)
    with pytest.raises(AttributionError, match="another rank"):
        agree(other(1, 1, number, -number), "test", bad=False)
    with pytest.raises(AttributionError, match="in different orders"):
        agree(other(0, 0, 7, -7), "test", bad=False)
    give_up(other(0, 0, number, -number), "test")


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
