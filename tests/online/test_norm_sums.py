"""The table of norms: what is added at once, what waits, and what is put together."""

import copy
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from secorder import CurvatureProbe
from secorder.layers.rank_one import FactorNorms
from secorder.online import norm_sums
from secorder.online.norm_sums import COLUMNS, Batch, Kind, NormSums, Terms, together_norms

from ..helpers import data, make, step
from ..reference import assert_close


def test_windows_are_put_together_as_if_they_were_one() -> None:
    whole, parts = NormSums.empty(2, torch.device("cpu")), [NormSums.empty(2, torch.device("cpu")) for _ in range(2)]
    for index in (0, 0, 1, 1, 1):
        increments = torch.rand(2, len(COLUMNS), dtype=torch.float64)
        increments[:, COLUMNS["kept"]] = 0.0
        for sums in (whole, parts[index]):
            sums.add([0, 1], increments, 0.9)
            sums.add([1], increments[:1], 0.9)
    both = together_norms(*parts)
    assert_close(both.table, whole.table, 1e-12)
    assert both.added == whole.added


def test_norms_may_come_as_factors() -> None:
    """Of all batches that are added at once, or of some; with a bias, and without."""
    kind = Kind((0, 1, 2), (True,) * 3, 4, Terms(4, 1.0, 2.0), None, False)
    mixed, plain = [], []
    for index in range(3):
        norms = [FactorNorms(torch.rand(4), torch.rand(4), biased) for biased in (True, False)]
        third = norms[1] if index else norms[1].squares()
        totals = list(torch.rand(3))
        mixed.append(Batch([norms[0], norms[1].squares().double(), third], totals))
        first = norms[0].cotangents.double().square() * (norms[0].inputs.double().square() + 1)
        both = norms[1].cotangents.double().square() * norms[1].inputs.double().square()
        plain.append(Batch([first, both, both], totals))
    sums = NormSums.empty(3, torch.device("cpu"))
    expected, _ = sums.increments(plain, kind)
    torch.testing.assert_close(sums.increments(mixed, kind)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("widths", [(1, 3), (2, 1, 2), (1, 1)])
def test_norms_of_batch_gradients_that_are_made_of_more_numbers_in_one_batch_than_in_another(
    widths: tuple[int, ...],
) -> None:
    """As where a layer of several parameters is run again in one of them; added at once, they were mixed up."""
    kind = Kind((0, 1), (True, True), 4, Terms(4, 1.0, 2.0), None, False)
    batches = [Batch(list(torch.rand(2, 4).double()), list(torch.rand(2 * width))) for width in widths]
    waiting, alone = (NormSums.empty(2, torch.device("cpu")) for _ in range(2))
    seen = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        waiting.wait(batch, kind, seen)
        alone.add((0, 1), alone.increments([batch], kind)[0][0], None)
    assert_close(waiting.table, alone.table, 1e-12)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_batches_that_wait_are_added_before_anyone_asks(decay: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes, one of them bad, to whoever reads, saves or copies; and none is lost where adding fails."""

    def told(most: int) -> list[Tensor]:
        monkeypatch.setattr(norm_sums, "MOST", most)
        torch.manual_seed(0)
        model, found = make(), []
        with CurvatureProbe(model, accumulate="trace", reduction="mean", decay=decay) as probe:
            for index, size in enumerate((6, 6, 6, 4, 4, 6, 6)):
                batch = data(size)
                if index == 1:
                    batch[0][1] = torch.inf
                step(model, batch)
                if index == 2:
                    found.append(torch.tensor([probe.num_samples, *(x.value for x in probe.fisher_trace().values())]))
            for one in (copy.deepcopy(probe._fisher), probe._fisher):
                found += [one.norms.table, one.seen]
            step(model, data(6))
            found += [trace.value for trace in probe.window().fisher_trace().values()]
        return [torch.as_tensor(x) for x in found]

    expected = told(1)
    for most in (2, 16):
        for found, one in zip(told(most), expected, strict=True):
            assert_close(found, one, 1e-12)
    model = make()
    with CurvatureProbe(model, accumulate="trace", reduction="mean", strict=True) as probe:
        for _ in range(2):
            step(model, data(6))
        with monkeypatch.context() as patch:
            patch.setattr(NormSums, "increments", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                probe.fisher_trace()
        assert probe.num_samples == 12
        assert all(x.num_samples == 12 for x in probe.fisher_trace().values())
