"""How many samples a batch holds, and where they are in its tensors."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._arguments import shown
from ._torch.pytree import Made, map_tensors, once_each, tensors_in
from .errors import InvalidArgumentError, InvalidTypeError
from .owners import Owned, owned_by_entries, owned_by_index, owned_by_lengths, replace_outermost, take_owned

#: What is said of data without a sample.
NO_BATCH = "the data holds no batch: pass at least one sample."


def batch_size(inputs: Any, targets: Any, sample_dim: int = 0) -> int:
    """The number of samples of a batch, at least one, which inputs and targets must agree on."""
    if any(t.is_nested for tree in (inputs, targets) for t in tensors_in(tree)):
        raise InvalidTypeError("nested tensors have no dimension that samples could be cut along: pass padded ones.")
    if any(t.is_meta for t in tensors_in(inputs)):
        raise InvalidArgumentError("inputs are on the meta device, where there are no numbers: pass real ones.")
    owned = owned_batch(inputs, targets, sample_dim)
    if owned is not None:
        return owned.num_samples
    sizes = sample_sizes(inputs, sample_dim)
    if not sizes:
        if targets is None and isinstance(inputs, list) and not inputs:
            raise InvalidArgumentError(NO_BATCH)
        raise InvalidTypeError(
            f"inputs must be a tensor, or a tuple or dict of tensors, with samples in dim {sample_dim}, got "
            f"{shown(inputs)}."
        )
    if 0 in sizes:
        raise InvalidArgumentError("the batch is empty: pass at least one sample.")
    known = [size for t in tensors_in(targets) for size in t.shape[: sample_dim + 1]]
    agreed = [size for size in sizes if size in known]
    count = next((size for size in agreed or sizes if size != 1), 1)  # a row for all samples, say a condition, has one
    # Targets of several rows a sample, such as one label a token, are for the model's output to confirm
    # (require_agreement).
    if not agreed and isinstance(targets, Tensor) and targets.dim() and targets.shape[0] % count:
        raise _mismatch(count, targets, sample_dim)
    return count


def owned_batch(inputs: Any, targets: Any, sample_dim: int = 0) -> Owned | None:
    """Whose what the model takes is, where its samples are entries of a list, or graphs, one for each target.

    None where a dimension holds them, or may: of one tensor, which nothing beside it tells of.
    """
    if isinstance(inputs, Tensor):
        return None
    known = {len(targets)} if type(targets) is list else {t.shape[0] for t in tensors_in(targets) if t.dim()}
    for owned in owned_by_entries(arguments_of(inputs)):
        tensors = zip(tensors_in(inputs), owned.owners, strict=True)
        of_samples = [t.shape[sample_dim : sample_dim + 1] for t, owner in tensors if owner is not None]
        if owned.num_samples in known and any(size != (owned.num_samples,) for size in of_samples):
            return owned
    for owned in (*owned_by_index(inputs), *owned_by_lengths(arguments_of(inputs))):
        rows = next(len(owner) for owner in owned.owners if isinstance(owner, Tensor))
        if owned.num_samples in known and rows not in known:
            return owned
    return None


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """What a model is called with: see :func:`secorder._torch.pytree.call_model`."""
    if isinstance(inputs, Mapping):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def require_agreement(output: Any, targets: Any, count: int, sample_dim: int) -> None:
    """Raise unless targets hold one row a sample, or as many rows as the model returned."""
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


def sample_dimension(tensor: Tensor, count: int, sample_dim: int = 0) -> int | None:
    """The dimension of a tensor that holds the batch's samples; None where it is shared by all of them."""
    for dim in (sample_dim, 0):
        if tensor.dim() > dim and tensor.shape[dim] == count:
            return dim
    return None


def take_samples(
    trees: Sequence[Any],
    index: Sequence[int],
    count: int,
    sample_dim: int = 0,
    *,
    rows: bool = False,
    cut: Made | None = None,
) -> list[Any]:
    """The batch that holds some of the samples, in this order: of inputs, outputs or targets.

    Tensors and arrays are cut in the dimension that holds the samples; lists of one entry a sample (numbers, texts,
    ragged tensors, dicts) by their entries; what has no such dimension is shared by all samples. A tensor that is in
    the trees twice stays one.

    Args:
        rows: tensors may hold several rows a sample in dim 0, sample after sample (a label for each token).
        cut: receives by ``id`` what became of each tensor.
    """
    how: Any = {"index": index, "count": count, "sample_dim": sample_dim}
    taken = partial(map_tensors, once_each(partial(_taken, rows=rows, **how), cut))
    return [replace_outermost(tree, partial(_chosen, **how), taken) for tree in trees]


def part_of_batch(
    inputs: Any,
    targets: Any,
    count: int,
    sample_dim: int,
    index: Sequence[int],
    *,
    owned: Owned | None = None,
    cut: Made | None = None,
) -> tuple[Any, Any]:
    """Inputs and targets of some samples. One tensor that is both stays one.

    Args:
        owned: whose the inputs are, where no dimension holds the samples.
        cut: receives by ``id`` what became of each tensor, where a dimension holds them.
    """
    rows = any(t.dim() and t.shape[0] > count for t in tensors_in(targets))
    how: Any = {"rows": rows, "cut": cut}
    if owned is not None:
        among, (args, kwargs) = list(tensors_in(inputs)), arguments_of(inputs)
        args = tuple(take_owned(x, owned, among, index) for x in args)
        kwargs = {name: take_owned(x, owned, among, index) for name, x in kwargs.items()}
        return kwargs or args, take_samples([targets], index, count, sample_dim, rows=rows)[0]
    if isinstance(inputs, (tuple, list)):  # arguments of the model, and no list of samples
        *taken, of_targets = take_samples([*inputs, targets], index, count, sample_dim, **how)
        return tuple(taken), of_targets
    of_inputs, of_targets = take_samples([inputs, targets], index, count, sample_dim, **how)
    return of_inputs, of_targets


def _chosen(tree: Any, index: Sequence[int], count: int, sample_dim: int) -> Any:
    """Some samples of what holds one entry for each, or an array one row; None for anything else."""
    if _one_entry_a_sample(tree, count, sample_dim):
        return type(tree)(tree[n] for n in index)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(tree, numpy.ndarray) and tree.ndim and tree.shape[0] == count:
        return tree[list(index)]
    return None


def _taken(tensor: Tensor, index: Sequence[int], count: int, sample_dim: int, rows: bool) -> Tensor:
    dim = sample_dimension(tensor, count, sample_dim)
    if dim is not None and len(index) == 1 and tensor.layout == torch.strided:
        return tensor.narrow(dim, index[0], 1)
    chosen = torch.tensor(index, device=tensor.device)
    if dim is not None:
        return tensor.index_select(dim, chosen)
    if rows and tensor.dim() and tensor.shape[0] and tensor.shape[0] % count == 0:
        by_sample = tensor.view(count, tensor.shape[0] // count, *tensor.shape[1:])
        return by_sample.index_select(0, chosen).flatten(0, 1)
    return tensor


def _one_entry_a_sample(tree: Any, count: int, sample_dim: int) -> bool:
    """Whether a list holds one entry for each sample, and not tensors that hold all of them."""
    if type(tree) not in (list, tuple) or len(tree) != count:
        return False
    tensors = list(tensors_in(tree))
    if tensors:
        return not all(sample_dimension(t, count, sample_dim) is not None for t in tensors)
    return type(tree) is list and not any(isinstance(x, (list, tuple, Mapping)) for x in tree)
