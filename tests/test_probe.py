"""The probe's life: accumulation, averages, every, pauses, checkpoints, and what is no training step."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from secorder import (
    CurvatureProbe,
    InvalidArgumentError,
    InvalidTypeError,
    ProbeStateError,
    per_layer_hessian_diagonal,
)

from .helpers import Taking, data, make, mlp, reference, step
from .reference import assert_all_close


def test_training_loop_is_left_alone_and_batches_of_different_size_are_averaged_over_samples() -> None:
    model, plain = make(), None
    plain = copy.deepcopy(model)
    probe = CurvatureProbe(model, reduction="mean")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    total, seen = {}, 0
    for count in (6, 3, 1):
        batch = data(count)
        for name, value in reference(model, batch).items():
            total[name] = total.get(name, 0) + value * count
        seen += count
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            step(m, batch)
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert probe.num_samples == seen
    assert_all_close(probe.fisher_diagonal().by_parameter(), {k: v / seen for k, v in total.items()})


def test_paused_reset_detach_attach() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    with probe.paused():
        step(model, batch)
    assert probe.num_samples == 0
    step(model, batch)
    assert probe.num_samples == 6
    probe.detach()
    probe.detach()
    step(model, batch)
    assert probe.num_samples == 6
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    with pytest.raises(ProbeStateError, match="detached"), probe.paused():
        pass
    probe.attach()
    with pytest.raises(ProbeStateError, match="attached already"):
        probe.attach()
    probe.reset()
    assert probe.num_samples == 0
    step(model, batch)
    assert probe.num_samples == 6


def test_with_attaches_a_probe_that_was_detached() -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batch)
    for expected in (12, 18):
        with probe:
            step(model, batch)
        assert probe.num_samples == expected
        assert not probe.attached
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_probe_that_nothing_refers_to_is_detached(in_a_cycle: bool) -> None:
    """As where a notebook's cell is run again: no further step pays for it, and a backward on its way works."""
    model, batch = make(), data()
    plain = copy.deepcopy(model)
    probe: Any = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    loss = F.cross_entropy(model(batch[0]), batch[1])
    left = weakref.ref(probe._attachment)
    if in_a_cycle:
        probe.itself = probe
    del probe
    gc.collect()
    assert not any(hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    loss.backward()
    del loss
    gc.collect()
    assert left() is None
    for _ in range(2):
        step(plain, batch)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_model_that_holds_its_probe_goes_with_it() -> None:
    model: Any = make()
    model.probe = CurvatureProbe(model, reduction="mean")
    step(model, data())
    assert model.probe.num_samples == 6
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_two_probes_on_one_model_do_not_see_each_other() -> None:
    model, batch = make(), data()
    first, second = CurvatureProbe(model, reduction="mean"), CurvatureProbe(model, layers="0", reduction="mean")
    step(model, batch)
    first.hessian_diagonal(F.cross_entropy, *batch)
    second.fisher_diagonal(F.cross_entropy, *batch)
    assert first.num_samples == second.num_samples == 6
    second.detach()
    step(model, batch)
    assert (first.num_samples, second.num_samples) == (12, 6)
    assert_all_close(first.fisher_diagonal().by_parameter(), reference(model, batch))


def test_what_is_no_sink_is_told_at_once() -> None:
    model = make()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, data())
        with pytest.raises(InvalidTypeError, match="a sink has scalars"):
            probe.log(None, 3)
        with pytest.raises(InvalidTypeError, match="step must be"):
            probe.log(Taking(), None)  # type: ignore[arg-type]


def test_what_is_accumulated_is_logged_with_a_hessian() -> None:
    model, batch, sink = make(), data(), Taking()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batch)
        hessian = per_layer_hessian_diagonal(model, F.cross_entropy, *batch)
        probe.log(sink, 3, hessian=hessian)
        probe.log(sink, 4)
        fisher = probe.fisher_diagonal()
    assert [step for step, _ in sink.points] == [3, 3, 4]
    fishers, hessians, later = (numbers for _, numbers in sink.points)
    assert fishers["fisher_trace/0"] == later["fisher_trace/0"] == pytest.approx(float(fisher["0"].sum()))
    assert hessians["hessian_trace/0"] == pytest.approx(float(hessian["0"].sum()))


FISHER, HESSIAN, TRACE, COST = "fisher_diagonal", "hessian_diagonal", "hessian_trace", "estimate_cost"
UNUSED: list[tuple[str, dict[str, Any], str]] = [
    (FISHER, {"num_draws": 8}, "num_draws=8 goes with fisher_type"),
    (FISHER, {"fisher_type": "type-2", "num_draws": 8}, "num_draws=8 goes with fisher_type"),
    (FISHER, {"fisher_type": "type-2", "max_draws": 8}, "max_draws=8 goes with rtol"),
    (FISHER, {"fisher_type": "mc", "rtol": 0.1}, "rtol goes with fisher_type"),
    (HESSIAN, {"method": "exact", "num_draws": 8}, "num_draws=8 goes with method"),
    (HESSIAN, {"method": "exact", "rtol": 0.1}, "rtol=0.1 goes with method"),
    (HESSIAN, {"method": "exact", "max_draws": 8}, "max_draws=8 goes with method"),
    (HESSIAN, {"method": "hutchinson", "max_hvps": 8}, "max_hvps=8 goes with method"),
    (HESSIAN, {"num_draws": 8, "max_draws": 9}, "max_draws=9 goes with rtol"),
    (HESSIAN, {"create_graph": True, "rtol": 0.1}, "rtol=0.1 goes without create_graph"),
    (TRACE, {"of": "ggn", "method": "exact", "num_draws": 8}, "num_draws=8 goes with method"),
    (TRACE, {"of": "fisher", "rtol": 0.1}, "rtol=0.1 goes with of"),
    (COST, {"method": "exact", "rtol": 0.1}, "rtol=0.1 goes with method"),
    (COST, {"fisher_type": "mc"}, "fisher_type='mc' goes with quantity"),
    (COST, {"max_iterations": 3}, "max_iterations=3 goes with quantity"),
    (COST, {"quantity": "eigenvalues", "num_draws": 3}, "num_draws=3 goes with"),
    (COST, {"quantity": "fisher", "method": "exact"}, "method='exact' goes with quantity"),
    (COST, {"quantity": "fisher", "max_hvps": 3}, "max_hvps=3 goes with quantity"),
    (COST, {"quantity": "fisher", "num_draws": 0}, "num_draws must be"),
]


@pytest.mark.parametrize(("method", "options", "words"), UNUSED, ids=str)
def test_an_option_without_effect_is_refused(method: str, options: dict[str, Any], words: str) -> None:
    with CurvatureProbe(mlp()) as probe, pytest.raises(InvalidArgumentError, match=words):
        getattr(probe, method)(F.cross_entropy, *data(), **options)
