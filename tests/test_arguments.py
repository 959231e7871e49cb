"""Numbers that users pass."""

from typing import Any

import numpy as np
import pytest
import torch

from secorder import InvalidArgumentError, InvalidTypeError
from secorder._arguments import require_integer, require_number


@pytest.mark.parametrize("value", [1, np.int64(3), torch.tensor(2)], ids=str)
def test_integers(value: Any) -> None:
    require_integer("every", value, 1)
    with pytest.raises(InvalidArgumentError, match=r"every must be at least 9, got \d"):
        require_integer("every", value, 9)


@pytest.mark.parametrize("value", [1.0, "1", None, [1]], ids=str)
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(InvalidTypeError, match="every must be an integer"):
        require_integer("every", value, 1)


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
