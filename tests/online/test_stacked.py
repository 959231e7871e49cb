"""Batches of small layers that are added several at once, against a loop over samples and against each by itself."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe
from secorder.layers.side_by_side import SideBySide
from secorder.online import stacked
from secorder.online.audit.audited import Audited

from ..helpers import data, in_sight_of_modes, make, reference, step
from ..reference import assert_all_close
from .test_host_reads import Reads


@pytest.fixture(autouse=True)
def _audits_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in most passes of a long run: what is audited is added at once."""
    monkeypatch.setattr(Audited, "draw", lambda *_, **__: set())


FIRST = torch.linspace(-1, 2, 24, dtype=torch.float64).view(6, 4).sin(), torch.arange(6) % 3


def probe_of(model: nn.Module, **options: Any) -> CurvatureProbe:
    """A probe that has seen one batch, of which norms are taken; where its samples are is known."""
    probe = CurvatureProbe(model, reduction="mean", **options)
    step(model, FIRST)
    probe.reset()
    step(model, FIRST)
    return probe


def waiting(probe: CurvatureProbe) -> int:
    return probe._fisher.stacked.waiting


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for number in range(count):
        inputs, targets = data(5 + number // 30)
        yield inputs * (1 + number / 50), targets


def mean_of(model: nn.Module, seen: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The diagonal of all batches together, by a loop over samples."""
    return reference(model, (torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])))


def test_batches_wait_and_are_read_as_if_they_had_not() -> None:
    """Whatever their sizes, and whenever they are read; what they were computed from is overwritten meanwhile."""
    model = make()
    seen, most = [FIRST], 0
    with probe_of(model) as probe:
        for number, (inputs, targets) in enumerate(batches(70)):
            seen.append((inputs.clone(), targets))
            step(model, (inputs, targets))
            inputs.zero_()
            most = max(most, waiting(probe))
            if number % 23 == 0:
                assert_all_close(probe.fisher_diagonal().by_parameter(), mean_of(model, seen))
                assert not waiting(probe)
        assert most == stacked.MOST - 1
        assert_all_close(probe.fisher_diagonal().by_parameter(), mean_of(model, seen))
        assert probe.num_samples == sum(len(x) for x, _ in seen)
        assert probe.num_batches == len(seen)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_batches_are_left_out_of_their_layers_alone(bad: float) -> None:
    """What is nan is so in both layers; of what is infinite, a tanh makes numbers again."""
    model, seen, layers = make(), [FIRST], ["0", "2"] if bad != bad else ["0"]
    with probe_of(model) as probe:
        for number in range(5):
            inputs, targets = data()
            if number % 2:
                seen.append((inputs, targets))
            else:
                inputs[2, 1] = bad
            step(model, (inputs, targets))
        assert waiting(probe) == 5
        expected, found = mean_of(model, seen), probe.fisher_diagonal().by_parameter()
        of_both = {name: found[name] for name in found if name.split(".")[0] in layers}
        assert_all_close(of_both, {name: expected[name] for name in of_both})
        assert {name: int(sums.counts[2]) for name, sums in probe._fisher.sums.items()} == {
            "0": len(seen), "2": len(seen) if "2" in layers else 6
        }  # fmt: skip
        assert {sums.batches for sums in probe._fisher.sums.values()} == {6}
        assert probe.num_samples == sum(len(x) for x, _ in seen) + (0 if "2" in layers else 18)


def test_a_changing_loss_scale_is_each_batch_s_own() -> None:
    model, scales, seen = make(), [], [FIRST]
    with probe_of(model, loss_scale=lambda: scales[-1] if scales else 1.0) as probe:
        for scale in (2.0, 2.0, 0.5, 0.5, 1.0):
            scales.append(scale)
            seen.append(data())
            step(model, seen[-1], scale)
        assert waiting(probe) == 1
        assert_all_close(probe.fisher_diagonal().by_parameter(), mean_of(model, seen))


@pytest.mark.parametrize("how", ["state", "pickle", "deepcopy", "window", "half"])
def test_whatever_is_made_of_a_probe_holds_what_waits(how: str) -> None:
    model, batch, last = make(), data(), data(4)
    with probe_of(model) as probe:
        step(model, batch)
        assert waiting(probe) == 1
        expected = mean_of(model, [FIRST, batch])
        if how == "state":
            state = probe.state_dict()
            step(model, batch)
            probe.load_state_dict(state)
            assert not waiting(probe)
            assert probe.num_batches == 2
        elif how == "window":
            assert_all_close(probe.window().fisher_diagonal().by_parameter(), expected)
            step(model, last)
            assert_all_close(probe.window().fisher_diagonal().by_parameter(), mean_of(model, [last]))
            expected = mean_of(model, [FIRST, batch, last])
        elif how == "half":  # where nothing is to be rounded
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
                probe.fisher_diagonal()
        else:
            other = copy.deepcopy(probe._fisher) if how == "deepcopy" else pickle.loads(pickle.dumps(probe._fisher))
            assert not other.stacked.waiting
            assert float(other.seen) == 12
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        probe.reset()
        step(model, last)
        assert_all_close(probe.fisher_diagonal().by_parameter(), mean_of(model, [last]))


@pytest.mark.parametrize("at", ["add_to", "count_together"])
def test_what_is_broken_off_is_added_later_or_told(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first sum nothing is lost, even where it happens as the last batch comes; after it, layers say so."""
    model = make()

    def breaks_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with probe_of(model) as probe:
        step(model, FIRST)
        with monkeypatch.context() as patch:
            patch.setattr(SideBySide if at == "add_to" else stacked, at, breaks_off)
            with pytest.raises(KeyboardInterrupt):
                probe.fisher_diagonal()
        if at == "count_together":
            with pytest.raises(AttributionError, match="broken off"):
                probe.fisher_diagonal()
            return
        for _ in range(stacked.MOST - 2):
            step(model, FIRST)
        with monkeypatch.context() as patch:
            patch.setattr(SideBySide, at, breaks_off)
            with pytest.raises(KeyboardInterrupt):
                step(model, FIRST)
        step(model, FIRST)
        assert_all_close(probe.fisher_diagonal().by_parameter(), mean_of(model, [FIRST]))
        assert float(probe._fisher.sums["0"].counts[2]) == stacked.MOST + 2


def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while batches wait nor as they are added."""
    in_sight_of_modes(monkeypatch)
    model = make()
    with probe_of(model) as probe:
        for _ in range(7):  # beyond the eighth batch, which is looked at
            step(model, FIRST)
        before = waiting(probe)
        with Reads() as reads:
            for _ in range(3):
                step(model, FIRST)
            assert waiting(probe) == before + 3
            probe._fisher.settle()
        assert not waiting(probe)
        assert not reads.counts


def test_averages_and_other_layers_do_not_wait() -> None:
    model = make()
    with probe_of(model, decay=0.5) as probe:
        step(model, FIRST)
        assert not waiting(probe)
    model = make(nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 5, 1), nn.Flatten())
    with CurvatureProbe(model, reduction="mean", layer_types="all") as probe:
        for _ in range(6):
            step(model, FIRST)
        assert not waiting(probe)
