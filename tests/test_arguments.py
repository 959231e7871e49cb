"""Numbers, devices, dtypes and words that users pass."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secorder import InvalidArgumentError, InvalidTypeError
from secorder._arguments import (
    listed,
    refuse_given,
    refuse_unused_draws,
    require_device,
    require_flag,
    require_floating_dtype,
    require_integer,
    require_number,
    require_one_of,
    shown,
)


@pytest.mark.parametrize("value", [1, np.int64(3), torch.tensor(2)], ids=str)
def test_integers(value: Any) -> None:
    require_integer("every", value, 1)
    with pytest.raises(InvalidArgumentError, match=r"every must be at least 9, got \d"):
        require_integer("every", value, 9)


@pytest.mark.parametrize("value", [1.0, "1", None, [1], True], ids=str)
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(InvalidTypeError, match="every must be an integer"):
        require_integer("every", value, 1)


def test_of_many_names_the_first_are_listed() -> None:
    assert listed(["a"]) == "'a'"
    assert listed([*"abcdef"]) == "'a', 'b', 'c', 'd', 'e', 'f'"
    assert listed([*"abcdefg"]) == "'a', 'b', 'c', 'd', 'e', 'f', … (7 in all)"


def test_numbers() -> None:
    for value in (1, 0.5, np.float32(0.5)):
        require_number("rtol", value)
    require_number("rtol", 0, zero=True)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="rtol must be positive"):
            require_number("rtol", wrong)
    with pytest.raises(InvalidArgumentError, match="rtol must be zero or positive"):
        require_number("rtol", -1, zero=True)
    for none in ("1", None, True, 1j):
        with pytest.raises(InvalidTypeError, match="rtol must be a number"):
            require_number("rtol", none)


def test_devices_and_dtypes() -> None:
    for device in (None, "cpu", torch.device("cpu")):
        require_device("accumulator_device", device)
    for dtype in (None, torch.float32, torch.bfloat16):
        require_floating_dtype("accumulator_dtype", dtype)
    with pytest.raises(InvalidArgumentError, match="such as"):
        require_device("accumulator_device", "nowhere")
    with pytest.raises(InvalidArgumentError, match="of this machine"):
        require_device("accumulator_device", "cuda:99")
    with pytest.raises(InvalidArgumentError, match="holds numbers"):
        require_device("accumulator_device", "meta")
    with pytest.raises(InvalidTypeError, match="such as"):
        require_device("accumulator_device", True)
    with pytest.raises(InvalidTypeError, match="such as"):
        require_device("accumulator_device", torch.float32)
    with pytest.raises(InvalidTypeError, match="such as"):
        require_floating_dtype("accumulator_dtype", "float32")
    with pytest.raises(InvalidArgumentError, match="real numbers"):
        require_floating_dtype("accumulator_dtype", torch.int32)
    with pytest.raises(InvalidArgumentError, match="16 bits or more"):
        require_floating_dtype("accumulator_dtype", torch.float8_e4m3fn)


def test_words() -> None:
    require_one_of("penalty", None, ("shared", None))
    with pytest.raises(InvalidArgumentError, match=r'^missing must be "raise" or "skip", got \[1\]\.$'):
        require_one_of("missing", [1], ("raise", "skip"))
    with pytest.raises(InvalidArgumentError, match='forwards must be "separate", "joined" or None, got 3'):
        require_one_of("forwards", 3, ("separate", "joined", None))


@pytest.mark.parametrize(
    "value",
    [np.ones(3), torch.randn(6, 3), nn.Sequential(nn.Linear(2, 2), nn.Tanh())],
    ids=lambda value: type(value).__name__,
)
def test_what_is_told_is_one_line(value: Any) -> None:
    """Also of what cannot be asked whether it is equal to a word."""
    assert "\n" not in shown(value)
    assert len(shown(value)) < 120
    with pytest.raises(InvalidArgumentError, match="missing must be"):
        require_one_of("missing", value, ("raise", "skip"))


def test_flags() -> None:
    for value in (True, False, 1, 0, np.bool_(True), torch.tensor(False)):
        require_flag("progress", value)
    for wrong in (None, "yes", 2, 1.0, torch.randn(6), np.ones(3, dtype=bool)):
        with pytest.raises(InvalidTypeError, match="progress must be True or False"):
            require_flag("progress", wrong)


def test_what_goes_by_draws_alone() -> None:
    refuse_given("is not used.", first=None)
    with pytest.raises(InvalidArgumentError, match="second=3 is not used"):
        refuse_given("is not used.", first=None, second=3)
    refuse_unused_draws("auto", 8, 0.1, 9, 10)
    refuse_unused_draws("auto", max_draws=9)
    for given in (("exact", 8), ("hutchinson", None, None, 9), ("hutchinson", 8, 0.1, 9, 10), ("auto", 8, None, 9)):
        with pytest.raises(InvalidArgumentError, match="goes with"):
            refuse_unused_draws(*given)
