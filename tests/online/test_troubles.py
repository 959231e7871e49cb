"""What keeps a layer's number from being told is said once in training, and raised when it is read."""

import warnings

import pytest

from secorder import AttributionError, CurvatureWarning
from secorder.online.troubles import Troubles, sentence


def test_a_mark_is_warned_of_once_and_keeps_its_first_reason() -> None:
    troubles = Troubles(["a", "b"], strict=False)
    with pytest.warns(CurvatureWarning, match="layer 'a': first"):
        troubles.mark(["a", "unknown"], "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        troubles.mark(["a"], "second")
    assert troubles.marks == {"a": "first"}


def test_a_strict_one_raises_at_once() -> None:
    with pytest.raises(AttributionError, match=r"layers \['a', 'b'\]: why"):
        Troubles(["a", "b"], strict=True).mark(["a", "b"], "why")


def test_why_nothing_was_accumulated_goes_by_what_was_seen() -> None:
    troubles = Troubles(["a"], strict=False)
    assert "was not called" in troubles.nothing_accumulated()
    troubles.saw("no grad")
    assert "torch.no_grad" in troubles.nothing_accumulated()


def test_sentences_name_the_layers() -> None:
    assert sentence(["a"], "why") == "layer 'a': why"
    assert sentence(["a", "b"], "why") == "layers ['a', 'b']: why"
