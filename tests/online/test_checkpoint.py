"""What was accumulated goes into a state and comes back."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from secorder import AttributionError, CurvatureProbe, InvalidArgumentError
from secorder._torch.graph import tells_recomputation
from secorder.online.norm_sums import COLUMNS

from ..helpers import data, mlp, step
from ..reference import assert_all_close


def test_a_state_is_tensors_alone_and_comes_back() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, decay=0.9, reduction="mean") as probe:
        step(model, batch)
        state = probe.state_dict()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        assert all(state[f"sums/{name}"].shape == p.shape for name, p in model.named_parameters())
        before = probe.fisher_diagonal()
        step(model, batch)
        before_now = {key: value.flatten() for key, value in state.items()}
        before_now["header"] = torch.cat([torch.tensor([4]), state["header"][1:5]])
        for loaded in (state, before_now):
            probe.load_state_dict(loaded)
        assert probe.num_samples == 6
        assert all(torch.equal(probe.fisher_diagonal()[name], value) for name, value in before.items())


def test_the_default_device_is_no_concern_of_a_state() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, decay=0.9) as probe:
        step(model, batch)
        with torch.device("meta"):
            state = probe.state_dict()
            probe.load_state_dict(state)
        assert not any(value.is_meta for value in state.values())


def test_a_state_that_is_none() -> None:
    probe = CurvatureProbe(mlp())
    for state in ({}, None, "probe.pt", dict.fromkeys(probe.state_dict(), 1)):
        with pytest.raises(InvalidArgumentError, match="version"):
            probe.load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
@pytest.mark.parametrize("windows", [False, True])
def test_a_damaged_state_is_refused_whole(accumulate: Any, windows: bool) -> None:
    """Each part in turn is cut, or missing."""
    model, batch = mlp(), data()
    with CurvatureProbe(model, accumulate=accumulate, reduction="mean") as probe:
        step(model, batch)
        if windows:
            probe.window()
            step(model, batch)
        state, before = probe.state_dict(), probe.fisher_trace()
        optional = "earlier/seen"  # without which there was no window
        for key, value in state.items():
            cut = {**state, key: value.flatten()[:-1]}
            missing = {other: x for other, x in state.items() if other != key}
            for damaged in (cut, missing) if key != optional else (cut,):
                with pytest.raises(InvalidArgumentError, match="state"):
                    probe.load_state_dict(damaged)
        assert probe.fisher_trace() == before
        probe.load_state_dict(state)
        assert probe.fisher_trace() == before


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
@pytest.mark.parametrize("windows", [False, True])
def test_a_part_of_what_ranks_had_is_the_whole_where_one_process_goes_on(accumulate: Any, windows: bool) -> None:
    model, batches = mlp(), [data(), data(), data()]

    def trained(*parts: Any, state: Any = None) -> CurvatureProbe:
        with CurvatureProbe(model, accumulate=accumulate, reduction="mean") as probe:
            if state is not None:
                probe.load_state_dict(state)
            for number, batch in enumerate(parts):
                step(model, batch)
                if windows and not number:
                    probe.window()
        return probe

    state = trained(*batches[:2]).state_dict()
    assert state["header"][-1] == 1
    state["header"][-1] = 3
    for key, value in state.items():  # a third of it, as each of three ranks has
        if key.endswith("seen"):
            whole = value[0].item()
            value[0] /= 3
            value[1] = whole - value[0]
        elif "sums/" in key:
            value /= 3
        elif "counts/" in key:
            value[:2] /= 3
        elif key.endswith("norms"):
            value[:, [i for name, i in COLUMNS.items() if name not in ("batches", "kept")]] /= 3
    found, expected = trained(batches[2], state=state), trained(*batches)
    assert found.num_samples == expected.num_samples
    for told, number in expected.fisher_trace().items():
        assert found.fisher_trace()[told].value == pytest.approx(number.value, rel=1e-12)
    noise, other = found.gradient_noise_scale().total, expected.gradient_noise_scale().total
    assert (noise.squared_norm, noise.variance) == pytest.approx((other.squared_norm, other.variance))
    if accumulate == "diagonal":
        assert_all_close(found.fisher_diagonal(), expected.fisher_diagonal())


def test_the_part_of_ranks_that_were_not_synchronised_stands_for_all_of_them() -> None:
    """Of the others nothing is known: each sample of it is as many."""
    model, batch = mlp(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batch)
        before, state = probe.fisher_diagonal(), probe.state_dict()
        state["header"][-1] = 3
        for _ in range(2):  # what goes on from it is one part itself
            probe.load_state_dict(state)
            assert probe.num_samples == 3 * len(batch[0])
            assert_all_close(probe.fisher_diagonal(), before)
            state = probe.state_dict()
            assert state["header"][-1] == 1


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
@pytest.mark.parametrize("kind", ["marked", "doubted"])
@pytest.mark.filterwarnings("ignore::secorder.CurvatureWarning")
def test_what_is_not_to_be_told_is_not_once_it_was_saved(kind: str) -> None:
    models = mlp(), mlp()
    probe, loaded = [CurvatureProbe(model, reduction="mean") for model in models]
    for number in range(5):
        x, y = torch.randn(6, 4), torch.randint(3, (6,))
        if kind == "doubted" and number == 4:
            y[:3] = -100
        z = models[0](x)
        (F.cross_entropy(z, y) + (z.std() if kind == "marked" else 0.0)).backward()
        models[0].zero_grad()
    state = probe.state_dict()
    for _ in range(2):
        loaded.load_state_dict(state)
        with pytest.raises(AttributionError, match=r"before the state was saved .* reset"):
            loaded.fisher_diagonal()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    loaded.reset()
    step(models[1], data())
    assert loaded.fisher_diagonal()
