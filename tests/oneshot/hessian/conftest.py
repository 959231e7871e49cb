"""What the tests of strategies share."""

import pytest


@pytest.fixture
def no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains are not found, so that small models go by other strategies."""
    monkeypatch.setattr("secorder.oneshot.hessian.investigate.find_chain", lambda *_: None)
