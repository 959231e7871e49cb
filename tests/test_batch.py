"""How many samples a batch holds, and where they are in its tensors."""

import pytest
import torch

from secorder import InvalidArgumentError, InvalidTypeError
from secorder.batch import batch_size, preferred_size, require_agreement, sample_dimension


@pytest.mark.parametrize(
    ("inputs", "targets", "dim", "count"),
    [
        (torch.zeros(5, 3), torch.zeros(5), 0, 5),
        (torch.zeros(3, 5), torch.zeros(5), 1, 5),
        ((torch.zeros(1, 2), torch.zeros(5, 3)), torch.zeros(5), 0, 5),  # one conditioning row for all
        ({"x": torch.zeros(5, 3)}, torch.zeros(20), 0, 5),  # four labels a sample
        (torch.zeros(1, 3), None, 0, 1),
    ],
)
def test_batch_size(inputs: object, targets: object, dim: int, count: int) -> None:
    assert batch_size(inputs, targets, dim) == count


def test_batches_that_are_none() -> None:
    with pytest.raises(InvalidTypeError, match="samples in dim 0"):
        batch_size("text", None)
    with pytest.raises(InvalidArgumentError, match="empty"):
        batch_size(torch.zeros(0, 3), None)
    with pytest.raises(InvalidArgumentError, match="5 samples and targets 4"):
        batch_size(torch.zeros(5, 3), torch.zeros(4))
    with pytest.raises(InvalidArgumentError, match="agree"):
        require_agreement(torch.zeros(5, 2), torch.zeros(20), 5, 0)
    require_agreement(torch.zeros(20, 2), torch.zeros(20), 5, 0)  # the model returned as many rows


def test_where_samples_are() -> None:
    assert sample_dimension(torch.zeros(4, 5), 5, 1) == 1
    assert sample_dimension(torch.zeros(5, 4), 5, 1) == 0
    assert sample_dimension(torch.zeros(3), 5) is None
    assert preferred_size([1, 1, 7, 5]) == 7
    assert preferred_size([1, 1]) == 1
