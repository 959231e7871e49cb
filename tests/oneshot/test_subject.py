"""What one-shot measurements are taken of: they attach nothing, and those of a probe are the same."""

from typing import Any

import pytest
import torch
from torch import nn

from secorder import CurvatureProbe, Diagonals
from secorder.layers.selection import select_layers
from secorder.oneshot.subject import Subject, fisher_of, hessian_of
from secorder.online.hooks import Attachment

from ..helpers import data, make


def same(one: Diagonals, other: Diagonals) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_measurements_attach_nothing_and_are_those_of_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(), (nn.functional.cross_entropy, *data())
    with CurvatureProbe(model) as probe:
        fisher, hessian = probe.fisher_diagonal(*batch), probe.hessian_diagonal(*batch, method="exact")

    def refuse(*_: Any) -> None:
        raise AssertionError("a hook on the model")

    monkeypatch.setattr(Attachment, "attach", refuse)
    subject = Subject(model, select_layers(model), None)
    assert same(fisher_of(subject, *batch), fisher)
    assert same(hessian_of(subject, *batch, method="exact"), hessian)
