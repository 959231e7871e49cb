"""Squares that are formed apart, and added together."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online import formed

from ..helpers import Net, data, reference, step
from ..reference import assert_all_close


def chain() -> nn.Module:
    """Layers of several positions a sample, of which norms alone bring gradients that are no products."""
    layers = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Linear(5, 3))
    return Net(lambda net, x: net.layers(torch.stack([x, 2 * x, x * x], 1)).mean(1), layers=layers)


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("on_nonfinite", ["skip", "keep", "raise"])
@pytest.mark.parametrize("most", [formed.chunk_elements(torch.device("cpu")), 30])
def test_how_many_wait_changes_nothing(
    most: int, on_nonfinite: Literal["skip", "keep", "raise"], decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formed, "chunk_elements", lambda device: most)
    model, batches = chain(), [data(5), data(40)]
    with CurvatureProbe(model, "all", on_nonfinite=on_nonfinite, decay=decay, reduction="mean") as probe:
        for batch in batches:
            step(model, batch)
        few, many = (reference(model, batch) for batch in batches)
        first, second = (5, 40) if decay is None else (decay, 1.0)
        expected = {name: (first * few[name] + second * many[name]) / (first + second) for name in few}
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


@pytest.mark.parametrize("place", ["first", "last"])
def test_squares_of_one_layer_that_are_no_numbers_are_left_out_of_it_alone(place: str) -> None:
    """The others that waited with it have theirs."""
    model, batch = chain(), data()
    name = {"first": "layers.0", "last": "layers.4"}[place]
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        step(model, batch)
        expected = reference(model, batch)
        with torch.no_grad():  # what comes out of it is as it was, and its squares are too large
            layer.weight /= 1e200
        handles = [layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1e200,))]
        step(model, batch)
        again = reference(model, batch)
        assert not torch.isfinite(again[f"{name}.weight"]).all()
        for key, found in probe.fisher_diagonal().by_parameter().items():
            of_both = expected[key] if key.startswith(name) else (expected[key] + again[key]) / 2
            assert_all_close({key: found}, {key: of_both})
        for handle in handles:
            handle.remove()


class Mixed(nn.Module):
    """One module that holds a matrix, a bias that is added once a sample, and perhaps a table."""

    def __init__(self, with_table: bool) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
        self.table = nn.Parameter(torch.randn(7, 4)) if with_table else torch.randn(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table[(x.abs() * 10).long() % 7]
        found: Tensor = (rows @ self.matrix).mean(1) + self.bias
        return found


@pytest.mark.parametrize("with_table", [True, False])
def test_parts_of_a_layer_of_several_forms(with_table: bool) -> None:
    model, batches = Mixed(with_table), [data(5), data(7)]
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for batch in batches:
            step(model, batch)
        few, many = (reference(model, batch) for batch in batches)
        found = probe.fisher_diagonal().by_parameter()
        assert found.keys() == dict(model.named_parameters()).keys()
        assert_all_close(found, {name: (5 * few[name] + 7 * many[name]) / 12 for name in found})


def test_what_waits_when_a_backward_is_broken_off_is_forgotten_by_a_reset() -> None:
    model, batch = chain(), data()

    def fails(_: Tensor) -> None:
        raise ValueError("half-way")

    with CurvatureProbe(model, "all", reduction="mean") as probe:
        step(model, batch)
        handle = model.get_submodule("layers.0").register_full_backward_pre_hook(lambda *_: fails(torch.ones(1)))
        with pytest.raises(ValueError, match="half-way"):
            step(model, data(3))
        handle.remove()
        probe.reset()
        step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
