"""Layers by their recorded outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.layers.layout import DIM_ZERO
from secorder.oneshot.measurement import Measurement
from secorder.oneshot.recorded_layer import (
    RecordedLayer,
    contract_pairs,
    layout_options,
    settle,
    settle_layouts,
    unsettled,
)
from secorder.oneshot.recording import recorded
from secorder.oneshot.roots import Single

from ..benchmarks.memory import peak_memory
from ..helpers import Fn, by_layer, data, make, measured
from ..reference import assert_close, fisher_by_sample


def layers_of(task: Measurement, recording: object) -> list[RecordedLayer]:
    inputs, leaves = recording.inputs, recording.leaves  # type: ignore[attr-defined]
    return [RecordedLayer(x, inputs[x.name], leaves[x.name]) for x in task.ruled]


@pytest.mark.parametrize("certain", [True, False])
def test_one_pair_of_gradients_makes_the_empirical_fisher(certain: bool) -> None:
    model, batch = make(), data()

    def work(task: Measurement) -> dict[str, list[Tensor]]:
        with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
            output, _ = task.loss()
            layers = layers_of(task, recording)
            g = output.softmax(1).detach() - F.one_hot(task.targets, 3)
            task.certain = certain
            plain = settle(task, [output], layers, Single(g), unsettled(task, [output], layers, by_graph=False))
            found = contract_pairs(task, [output], layers, Single(g), plain=plain)
        return {z.layer.name: values for z, values in zip(layers, found, strict=True) if values is not None}

    expected = fisher_by_sample(model, F.cross_entropy, *batch, 6)
    found = measured(work, model, batch)
    assert set(found) == {"0", "2"}
    for layer, values in found.items():
        for value, other in zip(values, by_layer(model, expected, layer), strict=True):
            assert_close(value.flatten(), other * 6)


def test_sizes_and_layouts_of_a_call() -> None:
    layer = measured(lambda task: task.ruled[0], make(), data())
    z = RecordedLayer(layer, [(torch.randn(6, 2, 4),)], [torch.zeros(6, 2, 5)])
    z.layouts = layout_options(z, 6)[0]
    assert z.layouts == [DIM_ZERO]
    assert (z.sizes, z.numel) == ([10], 25)
    assert layout_options(RecordedLayer(layer, [(torch.randn(5, 4),)], [torch.zeros(5, 5)]), 6) == []


def test_rows_that_are_no_samples_have_no_layout() -> None:
    def mixes(h: Tensor) -> Tensor:
        return h + 0.1 * h.flip(0)

    def work(task: Measurement) -> list[bool]:
        with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
            output, _ = task.loss()
            layers = layers_of(task, recording)
            settle_layouts(task, [output], layers, torch.randn(1, 6, 3))
        return [bool(z.layouts) for z in layers]

    assert measured(work, make(), data()) == [True, True]
    assert measured(work, make(Fn(mixes)), data()) == [False, True]


@pytest.mark.parametrize("way", ["fisher", "output-basis"])
def test_of_some_products_nothing_is_left_when_there_are_the_next(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secorder.oneshot.hessian.investigate.find_chain", lambda *_: None)
    monkeypatch.setattr("secorder.oneshot.hessian.decision.matters", lambda *_: False)  # by no time that it takes
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24))
    batch = torch.randn(32, 1), torch.randn(32, 24)

    def bytes_of(at_once: int) -> int:
        with CurvatureProbe(model, layers=["0"], reduction="mean") as probe:
            if way == "fisher":
                how = {"fisher_type": "type-2", "chunk_size": at_once}
                return peak_memory(lambda: probe.fisher_diagonal(F.mse_loss, *batch, **how))
            assert probe.hessian_diagonal(F.mse_loss, *batch).info["0"].strategy == way
            return peak_memory(lambda: probe.hessian_diagonal(F.mse_loss, *batch, chunk_size=at_once))

    assert bytes_of(12) < 0.6 * bytes_of(24)
