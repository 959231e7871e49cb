"""A window holds what came since the last look, and the total loses nothing."""

import pytest
import torch
from torch import Tensor

from secorder import CurvatureProbe, ProbeStateError
from secorder.online.fisher import Accumulate

from ..helpers import data, mlp, reference, step
from ..reference import assert_all_close


def mean(parts: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """Of Fishers with their weights."""
    return {
        name: torch.stack([w * part[name] for w, part in zip(weights, parts, strict=True)]).sum(0) / sum(weights)
        for name in parts[0]
    }


def test_each_window_is_the_mean_since_the_last_look() -> None:
    model, batches = mlp(), [data(n) for n in (6, 3, 5, 2)]
    expected = [reference(model, batch) for batch in batches]
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batches[0])
        first = probe.window()
        for batch in batches[1:3]:
            step(model, batch)
        second = probe.window()
        step(model, batches[3])
        assert_all_close(first.fisher_diagonal().by_parameter(), expected[0])
        assert_all_close(second.fisher_diagonal().by_parameter(), mean(expected[1:3], [3, 5]))
        assert (first.num_samples, second.num_samples, probe.num_samples) == (6, 8, 16)
        assert_all_close(probe.fisher_diagonal().by_parameter(), mean(expected, [6, 3, 5, 2]))
        probe.window()  # what is added to the total is none of those that were looked at before
        assert_all_close(first.fisher_diagonal().by_parameter(), expected[0])
        assert_all_close(probe.fisher_diagonal().by_parameter(), mean(expected, [6, 3, 5, 2]))
        probe.reset()
        step(model, batches[1])
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected[1])


def test_the_total_is_forgotten_where_it_is_not_wanted() -> None:
    model, batches = mlp(), [data(6), data(3)]
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batches[0])
        probe.window(keep_total=False)
        step(model, batches[1])
        assert probe.num_samples == 3
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batches[1]))


def test_windows_of_a_moving_average_and_of_bad_batches() -> None:
    """Attributions change nothing of the moving average, and each window has its own, whatever is left out."""
    model, batches = mlp(), [data() for _ in range(5)]
    batches[3][0][0] = torch.nan
    looked_at, not_looked_at = (CurvatureProbe(model, reduction="mean", decay=0.9) for _ in range(2))
    for batch in batches[:2]:
        step(model, batch)
    looked_at.window()
    for batch in batches[2:]:
        step(model, batch)
    assert looked_at.num_skipped == not_looked_at.num_skipped == dict.fromkeys(looked_at.layer_names, 1)
    fisher = not_looked_at.fisher_diagonal().by_parameter()
    assert_all_close(looked_at.fisher_diagonal().by_parameter(), fisher, 1e-12)
    window = looked_at.window()
    assert window.num_skipped == looked_at.num_skipped
    assert looked_at.window().num_skipped == {}
    expected = mean([reference(model, batches[i]) for i in (2, 4)], [0.9**2 * 0.1, 0.1])
    assert_all_close(window.fisher_diagonal().by_parameter(), expected)
    assert window.num_samples == 12
    assert_all_close(looked_at.fisher_diagonal().by_parameter(), fisher, 1e-12)
    assert looked_at.num_samples == 24


def test_an_empty_window_says_so() -> None:
    model = mlp()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, data())
        probe.window()
        empty = probe.window()
        assert empty.num_samples == 0
        with pytest.raises(ProbeStateError, match="nothing"):
            empty.fisher_diagonal()
        assert probe.num_samples == 6


def test_a_window_that_is_open_is_saved_and_loaded() -> None:
    model, batches = mlp(), [data(n) for n in (6, 3, 5)]
    with CurvatureProbe(model, reduction="mean", decay=0.5) as probe:
        step(model, batches[0])
        probe.window()
        step(model, batches[1])
        state = {name: value.clone() for name, value in probe.state_dict().items()}
        step(model, batches[2])
        uninterrupted, window = probe.fisher_diagonal(), probe.window()
        probe.load_state_dict(state)
        assert probe.num_samples == 9
        step(model, batches[2])
        assert all(torch.equal(probe.fisher_diagonal()[name], value) for name, value in uninterrupted.items())
        again = probe.window()
        assert again.num_samples == window.num_samples == 8
        for name, value in window.fisher_diagonal().items():
            assert torch.equal(again.fisher_diagonal()[name], value)


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_what_is_taken_out_where_a_user_evaluates_can_be_added_to(accumulate: Accumulate) -> None:
    """Sums made under ``inference_mode`` could not: training went on without being recorded."""
    model, batches = mlp(), [data(n) for n in (6, 3, 5)]
    with torch.inference_mode():
        probe = CurvatureProbe(model, reduction="mean", accumulate=accumulate)
    for batch in batches:
        step(model, batch)
        with torch.inference_mode():
            probe.window()
            state = probe.state_dict()
            probe.reset()
            probe.load_state_dict(state)
    step(model, batches[0])
    probe.detach()
    expected = mean([reference(model, batch) for batch in (*batches, batches[0])], [6, 3, 5, 6])
    traces = {name: trace.value for name, trace in probe.fisher_trace().items()}
    for name, trace in traces.items():
        own = sum(part.sum() for key, part in expected.items() if key.rpartition(".")[0] == name)
        assert trace == pytest.approx(float(own))
