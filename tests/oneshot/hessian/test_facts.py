"""Facts tell which of them were looked at."""

import dataclasses

import pytest

from secorder.oneshot.hessian.facts import Facts


def test_checks_are_of_what_was_looked_at() -> None:
    facts = Facts("a", numel=4)
    assert facts.checks == {}
    facts = dataclasses.replace(facts, own_use=True, piecewise_linear=False)
    assert facts.checks == {"own_use": True, "piecewise_linear": False}


def test_facts_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Facts("a", numel=4).used = False  # type: ignore[misc]
