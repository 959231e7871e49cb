"""Sums of squares of one layer, with what counts and what does not."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.layers.per_sample import Outer
from secorder.layers.selection import select_layers
from secorder.online import sums as sums_module
from secorder.online.sums import LayerSums, count_good

from ..helpers import data, mlp, step
from ..reference import assert_all_close, assert_close


def test_what_is_added_counted_and_left_out() -> None:
    (layer,) = select_layers(nn.Sequential(nn.Linear(4, 3)))
    a, g = torch.randn(5, 1, 1, 4), torch.randn(5, 1, 1, 3)
    squares = torch.einsum("nj,ni->ji", g[:, 0, 0] ** 2, a[:, 0, 0] ** 2).flatten()
    sums = LayerSums.empty([layer], None, None)[layer.name]
    for good in (None, torch.tensor(True), torch.tensor(False)):
        sums.add(layer, [[Outer(a, g)], [Outer(None, g)]], decay=None, alpha=2.0, good=good)
        sums.count(5, good, None)
    assert_close(sums.sums[0], 4 * squares)
    assert_close(sums.sums[1], 4 * (g[:, 0, 0] ** 2).sum(0))
    assert sums.counts.tolist() == [10, 10, 2]
    assert sums.batches == 3


def test_what_is_good_is_counted_together() -> None:
    layers = select_layers(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    every = LayerSums.empty(layers, None, None)
    seen, marks = torch.zeros((), dtype=torch.float64), dict[str, str]()
    waiting = {("0", "1"): (12, 2), ("1",): (5, 1), (): (17, 3)}
    count_good(waiting, every, seen, marks)
    assert [sums.counts.tolist() for sums in every.values()] == [[12, 12, 2], [17, 17, 3]]
    assert [sums.batches for sums in every.values()] == [2, 3]
    assert (seen.item(), waiting, marks) == (17, {}, {})


def test_counting_that_is_broken_off_is_told() -> None:
    every, marks = LayerSums.empty(select_layers(nn.Sequential(nn.Linear(4, 3))), None, None), dict[str, str]()
    with pytest.raises(KeyError):
        count_good({("0",): (12, 2), ("gone",): (5, 1)}, every, torch.zeros(()), marks)
    assert "broken off (KeyError)" in marks["0"]


def test_sums_follow_a_layer_that_gets_memory() -> None:
    (layer,) = select_layers(nn.Sequential(nn.Linear(4, 3, device="meta")))
    sums = LayerSums.empty([layer], None, None)[layer.name]
    (moved,) = select_layers(nn.Sequential(nn.Linear(4, 3)))
    sums.follow(moved, None, None)
    assert {t.device.type for t in (*sums.sums, sums.counts)} == {"cpu"}
    assert not any(t.any() for t in (*sums.sums, sums.counts))


def test_what_is_on_its_way_to_the_host_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that arrive when they are asked for, each once, in the order of the steps, also of a moving average."""
    waited: list[int] = []

    def begin(tensor: Tensor) -> object:
        kept = tensor.clone()
        tensor.fill_(torch.nan)  # its memory is another's by then
        return lambda: waited.append(1) or kept

    def trained(**options: object) -> CurvatureProbe:
        model = mlp()
        with CurvatureProbe(model, accumulator_dtype=torch.float32, reduction="mean", **options) as probe:
            for count in (4, 6, 5):
                step(model, data(count))
        return probe

    for options in ({}, {"decay": 0.9}):
        expected = trained(**options).fisher_diagonal()
        with monkeypatch.context() as patch:
            patch.setattr(sums_module, "begin_copy", begin)
            patch.setattr(sums_module, "goes_to_host", lambda tensor, there: True)
            waited.clear()
            probe = trained(**options)
            count = len(waited)
            assert 0 < count < sum(len(layer.sums) for layer in probe._fisher.sums.values()) * 3
            copies = [probe, copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))]
        for one in copies:
            assert_all_close(one.fisher_diagonal(), expected, 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a CUDA device")
def test_sums_in_the_memory_of_the_host() -> None:
    found = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 10)).cuda()
        with CurvatureProbe(model, accumulator_device=device) as probe:
            for _ in range(5):
                x, y = torch.randn(64, 300, device="cuda"), torch.randint(10, (64,), device="cuda")
                F.cross_entropy(model(x), y).backward()
        found.append({name: value.cpu() for name, value in probe.fisher_diagonal().items()})
    assert_all_close(found[1], found[0], 1e-12)
