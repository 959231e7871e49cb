"""Tensor parallelism: the parts of a layer that a rank computes with, and what lies there of inputs and gradients.

Where a matrix is sharded by its outputs (``ColwiseParallel``), each rank has the whole input a and its columns of
the cotangent g; where it is sharded by its inputs (``RowwiseParallel``), its columns of a and the whole g. In both the
product gᵀ a of what a rank has *is* its part of the per-sample gradient, so that squares are formed and kept where they
are::

    weight      input       cotangent
    Shard(0)    Replicate   Shard(-1)
    Shard(1)    Shard(-1)   Replicate
    Replicate   Replicate   Replicate

An embedding's rows are sharded by the first, its columns by the second: of ids each rank looks up its own. Anything
else is refused in words: by :func:`check` before training, by :func:`own` where a call brings it.

Source: Shoeybi, Patwary, Puri, LeGresley, Casper, Catanzaro (2019), "Megatron-LM: training multi-billion parameter
language models using model parallelism".
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import AttributionError, InvalidArgumentError
from .spread import Spread

#: Of what lies over the ranks: None, all of it on each; else the dimension that is sharded.
Layouts = tuple[int | None, int | None]


def check(name: str, module: nn.Module, parameters: Mapping[str, Any], spread: Spread) -> None:
    """Refuse what is sharded in a way that is not known: the type of the layer, the dimension, or a mesh of several."""
    sharded = {
        local: [p.placements[dim].dim for dim in spread.tensor if not p.placements[dim].is_replicate()]
        for local, p in parameters.items()
    }
    known = isinstance(module, (nn.Linear, nn.Embedding)) and len(spread.tensor) == 1
    partial = any(p.placements[dim].is_partial() for p in parameters.values() for dim in spread.tensor)
    one_dim = all(dims in ([], [0], [1]) for dims in sharded.values())
    if partial or (any(sharded.values()) and not (known and one_dim)):
        raise InvalidArgumentError(
            f"layer {name!r} ({type(module).__name__}) lies over the ranks in a way that is not known: tensor "
            "parallelism is, of nn.Linear and nn.Embedding by ColwiseParallel or RowwiseParallel over one dimension "
            "of the mesh; leave the layer out with layers=."
        )


def layouts(module: nn.Module, weight: Any, spread: Spread) -> Layouts:
    """Where a layer's input and the cotangent of its output are to lie, by how its weight is sharded."""
    placement = weight.placements[spread.tensor[0]]
    if placement.is_replicate():
        return None, None
    if isinstance(module, nn.Embedding):
        return None, None if placement.dim == 0 else -1
    return (None, -1) if placement.dim == 0 else (-1, None)


def own(tensor: Any, sharded: int | None, what: str) -> Tensor:
    """This rank's part, sharded or not, of an input, a cotangent or a gradient, all of which may be here.

    Raises :class:`AttributionError` where it lies otherwise, as under sequence parallelism.
    """
    if not hasattr(tensor, "placements"):
        placement = None
    else:
        (placement, *more) = tensor.placements
        tensor = tensor.detach()
        if more or placement.is_partial() or (placement.is_shard() and placement.dim != _positive(sharded, tensor)):
            raise _otherwise(what, placement)
    if (placement is None or placement.is_replicate()) != (sharded is None):
        raise _otherwise(what, placement)
    found: Tensor = tensor if placement is None else tensor.to_local()
    return found


def _positive(dim: int | None, tensor: Tensor) -> int | None:
    return None if dim is None else dim % max(tensor.dim(), 1)


def _otherwise(what: str, placement: Any) -> AttributionError:
    return AttributionError(
        f"{what} lies over the ranks as {placement}, from which its part of the per-sample gradients cannot be "
        "computed: use ColwiseParallel and RowwiseParallel, whose layers gather their inputs first, or leave the layer "
        "out with layers=."
    )


def own_rows(ids: Tensor, g: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Of looked up rows those that this rank has: others get nothing."""
    here = (ids >= first) & (ids < first + count)
    return (ids - first).clamp(0, max(count - 1, 0)), g * here.unsqueeze(-1)
