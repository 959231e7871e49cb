"""Numbers that are kept on the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from secorder.online import constants
from secorder.online.constants import Constants


class Copies(TorchDispatchMode):
    """Counts what makes a tensor of the host's numbers."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "lift_fresh" in str(function)
        return function(*args, **(kwargs or {}))


def test_numbers_are_where_they_are_needed() -> None:
    """Of a model on several devices, that may be another one each time."""
    kept = Constants()
    for device in ("cpu", "meta", "cpu"):
        for dtype in (torch.float64, torch.long):
            found = kept.vector([3, 1, 3], torch.zeros(1, device=device, dtype=dtype))
            assert (found.device.type, found.dtype) == (device, dtype)
            if device == "cpu":
                assert found.tolist() == [3, 1, 3]


@pytest.mark.parametrize("most", [1, 16])
def test_a_number_is_copied_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MOST", most)
    kept, like = Constants(), torch.zeros(())
    with Copies() as copies:
        for numbers in ([0.5, 2.0], [2.0, 0.5], [0.5], [0.5, 2.0]):
            assert kept.vector(numbers, like).tolist() == numbers
    assert copies.count == 2
