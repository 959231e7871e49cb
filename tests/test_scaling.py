"""The table of what a probe keeps and sends on many ranks."""

import json

import pytest

from .benchmarks import scaling
from .benchmarks.scaling import costs, ring, rows
from .helpers import run_ranks
from .scaling_ranks import EXPECTED, SMALL


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_real_processes_keep_and_send_what_fake_ones_tell(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SEQUENCES", 4)
    monkeypatch.setenv(EXPECTED, json.dumps(costs(SMALL, 2, ranks // 2)))
    run_ranks("scaling", ranks)


def test_each_rank_keeps_its_part() -> None:
    found = {ranks: costs(SMALL, ranks, 2)["diagonal"] for ranks in (2, 4)}
    norms = 5 * 16 * 4  # bytes of what is not cut by tensors, and by data alone
    assert (found[2].kept - found[4].kept) == found[2].scattered // 4
    assert found[2].scattered == found[4].scattered == (scaling_elements() * 4 - norms) // 2 + norms
    assert ring(found[2], 2) > 0
    ((name, count, *_),) = rows([SMALL], [(2, 2)])
    assert (name, count) == ("small", "4")


def scaling_elements() -> int:
    return sum(p.numel() for p in scaling.Net(SMALL).parameters())
