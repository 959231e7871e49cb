"""How many samples a batch holds, and where they are in its tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._torch.pytree import tensors_in
from .errors import InvalidArgumentError, InvalidTypeError

__all__ = [
    "batch_size",
    "preferred_size",
    "require_agreement",
    "sample_dimension",
    "sample_sizes",
]


def batch_size(inputs: Any, targets: Any, sample_dim: int = 0) -> int:
    """The number of samples of a batch, which inputs and targets must agree on.

    Raises:
        InvalidTypeError: there is no tensor among the inputs.
        InvalidArgumentError: the batch is empty, or inputs and targets have different sizes.
    """
    sizes = sample_sizes(inputs, sample_dim)
    if not sizes:
        raise InvalidTypeError(
            f"inputs must be a tensor, or a tuple or dict of tensors, with samples in dim {sample_dim}."
        )
    if 0 in sizes:
        raise InvalidArgumentError("the batch is empty: pass at least one sample.")
    known = [size for t in tensors_in(targets) for size in t.shape[: sample_dim + 1]]
    agreed = [size for size in sizes if size in known]
    count = preferred_size(agreed or sizes)
    # Targets of several rows a sample, such as one label a token, are for the model's output to confirm
    # (require_agreement).
    if not agreed and isinstance(targets, Tensor) and targets.dim() and targets.shape[0] % count:
        raise _mismatch(count, targets, sample_dim)
    return count


def require_agreement(output: Any, targets: Any, count: int, sample_dim: int) -> None:
    """Raise unless targets hold one row a sample, or as many rows as the model returned.

    Raises:
        InvalidArgumentError: they do not.
    """
    if not isinstance(targets, Tensor) or not targets.dim():
        return
    if sample_dimension(targets, count, sample_dim) is None and not any(
        t.dim() and t.shape[0] == targets.shape[0] for t in tensors_in(output)
    ):
        raise _mismatch(count, targets, sample_dim)


def _mismatch(count: int, targets: Tensor, sample_dim: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"inputs hold {count} samples and targets {targets.shape[0]}: they must agree in dim {sample_dim} "
        "(pass sample_dim= if samples are in another dimension)."
    )


def sample_sizes(tree: Any, sample_dim: int = 0) -> list[int]:
    """Sizes of dimension ``sample_dim`` of the tensors that have one."""
    return [tensor.shape[sample_dim] for tensor in tensors_in(tree) if tensor.dim() > sample_dim]


def preferred_size(sizes: Sequence[int]) -> int:
    """The first size that is not one (a row for all samples, such as a conditioning vector, has one), or one."""
    return next((size for size in sizes if size != 1), 1)


def sample_dimension(tensor: Tensor, count: int, sample_dim: int = 0) -> int | None:
    """The dimension of a tensor that holds the batch's samples; None where it is shared by all of them."""
    for dim in (sample_dim, 0):
        if tensor.dim() > dim and tensor.shape[dim] == count:
            return dim
    return None
