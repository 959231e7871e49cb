"""What is decided of a layer once, and each condition that is held against its calls."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online import capture

from ..helpers import data, make, mlp, reference, step
from ..reference import assert_all_close


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each gradient that came was taken as its layer's plan says."""
    found: list[bool] = []
    bring = capture.bring_rank_one

    def watched(*args: Any) -> bool:
        found.append(bring(*args))
        return found[-1]

    monkeypatch.setattr(capture, "bring_rank_one", watched)
    return found


def test_a_plan_is_followed_and_brings_the_same(planned: list[bool]) -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(3):
            step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    assert planned
    assert all(planned)


@pytest.mark.parametrize(
    "options",
    [
        {"forwards": "joined"},
        {"penalty": "shared"},
        {"on_nonfinite": "raise"},
        {"precision": "bfloat16"},
        {"reduction": lambda x: torch.full((len(x),), 1 / len(x))},
    ],
)
def test_what_is_not_accumulated_layer_by_layer_as_it_is_has_none(planned: list[bool], options: dict[str, Any]) -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, **{"reduction": "mean", **options}) as probe:
        step(model, batch)
        tolerance = 2e-2 if "precision" in options else 1e-9
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch), tolerance)
    assert not any(planned)


def test_a_layer_that_is_told_for_another_ones_sake_has_none(planned: list[bool]) -> None:
    """It is not selected, and shares the weight of one that is."""
    batch = data()
    twin = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    twin[2].weight = twin[0].weight
    with CurvatureProbe(twin, layers=["0", "3"], reduction="mean") as probe:
        step(twin, batch)
        expected = reference(twin, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
    assert planned.count(True) == 1  # of the one that shares nothing


class Twice(nn.Module):
    """Whose layer is called twice where the first entry of its input is positive; over positions where told."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh()
        return self.head(self.inner(h) if self.twice else h)


def test_a_second_call_is_no_part_of_a_plan(planned: list[bool]) -> None:
    model, batch = Twice(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        for model.twice in (False, False, True, False):
            probe.reset()
            step(model, batch)
            assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    assert planned.count(False) == 2  # those of the layer that was called twice


def test_a_plan_ends_where_the_model_has_another_dtype(planned: list[bool]) -> None:
    model, (x, y) = mlp(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, (x, y))
        assert all(planned)
        model.float()
        planned.clear()
        step(model, (x.float(), y))
        assert not any(planned)
        probe.reset()
        planned.clear()
        step(model, (x.float(), y))
        assert all(planned)
        expected = {name: d.double() for name, d in reference(model, (x.float(), y)).items()}
        found = {name: d.double() for name, d in probe.fisher_diagonal().by_parameter().items()}
        assert_all_close(found, expected, 1e-5)
