"""Normalisation of one sample by channels: PyTorch's own backward pass may read its gradient in the wrong order.

Where a tensor of one sample is cut into tokens, ``z.flatten(2).transpose(1, 2)``, its gradient has the strides of a
view whose first dimension has one entry. On a CPU, the backward pass of ``native_batch_norm`` then takes what it saved
to have channels last, too.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .surroundings import assigned


def contiguous_gradients() -> AbstractContextManager[Any]:
    """Inside, batch and instance normalisation of one sample get gradients whose entries lie in order.

    The functions are exchanged: a mode would look at every other call, which took small networks 9 % longer.
    """
    return assigned([F], batch_norm=_in_order(F.batch_norm), instance_norm=_in_order(F.instance_norm))


def _in_order(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The one sample is taken out and put back, of which the backward pass makes a new tensor."""

    @wraps(norm)
    def in_order(*args: Any, **kwargs: Any) -> Tensor:
        result = norm(*args, **kwargs)
        return result[0][None] if result.dim() > 3 and len(result) == 1 else result

    return in_order
