"""What all samples of a batch decide together: a branch, a number, or the size of the batch.

It may stay as it is while samples change places, or while some are replaced by others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch.pytree import map_tensors, tensors_in
from .._torch.random_state import cuda_devices, get_random_state, same_random_state
from ..batch import sample_dimension
from .independence import changed_entries, placed, without_gradients
from .isolation import IsolatedModel

#: Samples in the first, cheap batches.
FEW = 64


def alone_as_together(
    isolated: IsolatedModel, inputs: Any, count: int, sample_dim: int, forward: Callable[[Any], Any], output: Any = None
) -> bool:
    """Whether samples keep their outputs where all others are copies of theirs, and in a batch without the last one.

    The former are those with the smallest and the largest sum, between which there is what a mean is compared with.
    Samples stay in their places, which may differ (of dropout, of a list beside the tensors). Without the last one all
    others change where the size of the batch counts. Where the first few samples alone keep their outputs, no more is
    run; where not, rounding or other draws may be why, of which there are none, or the fewest, in a batch of the size.
    Nothing is told by batches that the model does not take.
    """
    if count < 3:
        return True
    cuda = cuda_devices(isolated.model)
    before = without_gradients(forward, inputs) if output is None else output
    base = [tensor.detach() for tensor in tensors_in(before)]

    def changed(samples: Sequence[int]) -> Tensor | None:
        """Which samples change where the given ones are in the batch, of which each place has one."""

        def taken(tensor: Tensor) -> Tensor:
            dim = sample_dimension(tensor, count, sample_dim)
            return tensor if dim is None else tensor.index_select(dim, torch.tensor(samples, device=tensor.device))

        found = torch.zeros(len(samples), dtype=torch.bool, device="cpu")
        try:
            pairs = list(placed(base, without_gradients(forward, map_tensors(taken, inputs)), count, sample_dim))
        except Exception:  # of the model, or of another number of outputs
            return None
        for expected, after, dim in pairs:
            if taken(expected).shape != after.shape:
                return None
            entries = changed_entries(expected.narrow(dim, 0, len(samples)), after).movedim(dim, 0)
            found |= entries.reshape(len(samples), -1).any(1).cpu()
        return found

    few = min(count, FEW)
    for sample in _extremes(inputs, few, count, sample_dim):
        if all((found := changed([sample] * size)) is not None and bool(found[sample]) for size in (few, count)):
            return False
    found = changed(range(min(few, count - 1)))
    if found is None or not bool(found.all()):
        return True
    changed([0] * count)
    drawn, found = get_random_state(cuda), changed(range(count - 1))
    return found is None or not bool(found.all()) or not same_random_state(drawn, get_random_state(cuda))


def _extremes(inputs: Any, few: int, count: int, sample_dim: int) -> set[int]:
    """Of the first samples those with the smallest and the largest sum of numbers."""
    for tensor in tensors_in(inputs):
        dim = sample_dimension(tensor, count, sample_dim)
        if dim is not None and tensor.layout == torch.strided and not tensor.is_complex():
            sums = tensor.detach().narrow(dim, 0, few).movedim(dim, 0).reshape(few, -1).sum(1)
            return {int(sums.argmin()), int(sums.argmax())}
    return {0, few - 1}
