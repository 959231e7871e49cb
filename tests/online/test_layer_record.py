"""What one forward tells of a layer goes through its phases, and is nobody else's."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import CurvatureProbe
from secorder.online.audit.audited import Audited
from secorder.online.hooks import Attachment
from secorder.online.layer_record import LayerRecord, Start
from secorder.online.record import ForwardRecord

from ..helpers import Net, data, mlp, step


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[ForwardRecord]:
    """Those of all forwards, in the order in which they begin."""
    begun: list[ForwardRecord] = []
    register = Attachment.register

    def watched(attachment: Attachment, record: ForwardRecord) -> None:
        begun.append(record)
        register(attachment, record)

    monkeypatch.setattr(Attachment, "register", watched)
    return begun


def test_two_forwards_in_flight_have_layer_records_of_their_own(records: list[ForwardRecord]) -> None:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    with CurvatureProbe(model):
        losses = [F.cross_entropy(model(x), y) for x, y in (data(6), data(3))]
        for loss in reversed(losses):
            loss.backward()
    for record, size in zip(records, (6, 3), strict=True):
        assert record.called == ["a", "b"]
        assert record.layers["a"].calls == [((size, 4),), ((size, 4),)]
        assert record.layers["a"].hooked == {0, 1}
        assert record.layers["b"].elements == size * 3
        assert all(own.received and own.reached and not own.captured for own in record.layers.values())


def test_a_gradient_that_is_not_accumulated_passes(records: list[ForwardRecord]) -> None:
    model, (x, y) = mlp(), data()
    with CurvatureProbe(model):
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert all(own.passed is not None and not own.reached for own in records[0].layers.values())


def test_a_layer_that_is_left_out_is_troubled_in_this_forward_alone(records: list[ForwardRecord]) -> None:
    model, (x, y) = mlp(), data()
    with CurvatureProbe(model) as probe:
        for troubled in (["2"], []):
            loss = F.cross_entropy(model(x), y)
            records[-1].leave_out(troubled)
            loss.backward()
    assert [record.layers["2"].troubled for record in records] == [True, False]
    assert {name: sums.batches for name, sums in probe._fisher.sums.items()} == {"0": 2, "2": 1, "4": 2}


def test_a_layer_that_is_left_out_after_its_gradient_has_come_brings_no_norms(
    records: list[ForwardRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Audited, "draw", lambda *_, **__: set())  # so that its norms are taken at once
    model, batch = mlp(), data()
    with CurvatureProbe(model, accumulate="trace") as probe:
        step(model, batch)
        expected = probe.fisher_trace()["2"].value
        handle = model[0].register_full_backward_hook(lambda *_: records[-1].leave_out(["2"]))
        for p in model.parameters():
            p.data.mul_(1.5)
        step(model, batch)
        handle.remove()
        found = probe.fisher_trace()
    assert [own.num_samples for own in found.values()] == [12, 6, 12]
    assert found["2"].value == pytest.approx(expected, rel=1e-12)


def test_a_call_that_overwrites_its_arguments_cannot_start_again() -> None:
    x = torch.zeros(3)
    start = Start(nn.Identity(), (x,), {}, (), held=False)
    assert not start.overwritten()
    x.add_(1)
    assert start.overwritten()


def test_draws_of_python_are_seen_since_a_start_that_took_note_of_them() -> None:
    starts = [Start(nn.Identity(), (), {}, (), held=False, draws=draws) for draws in (True, False)]
    assert not any(start.drew() for start in starts)
    random.random()
    assert [start.drew() for start in starts] == [True, False]


@pytest.mark.parametrize(
    "came", [{"received": True}, {"captured": [(0, (), None)]}, {"modules": [object()]}, {"parts": ({}, None)}]
)
def test_whatever_has_come_reaches_a_layer(came: dict[str, Any]) -> None:
    own = LayerRecord()
    own.calls.append(((2, 3),))
    own.hooked.add(0)
    assert not own.reached
    vars(own).update(came)
    assert own.reached
