"""Rows that are looked up in a table."""

from typing import Any

import torch
from torch import Tensor

from ..._torch.graph import Node, operation_of, saved, signed
from ..per_sample import PerSample, Rows
from .call import OperationCall
from .registry import operation_rule


@operation_rule("EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0")
def looked_up(call: OperationCall, _: int) -> PerSample | None:
    """``F.embedding(ids, table)``, ``table[ids]`` by the first dimension alone, and ``table.index_select(0, ids)``."""
    ids = rows_of(call.node, call.shape(0))
    if ids is None or call.layout.dim >= ids.dim():
        return None
    found, g = call.layout.split(ids), call.layout.split(without_padding(call.node, call.g, ids))
    found = found.flatten(1) if found.dim() > 1 else found[:, None]
    return Rows(found, g.reshape(*found.shape, g.shape[-1]), call.shape(0)[0])


def rows_of(node: Node, shape: tuple[int, ...]) -> Tensor | None:
    """Which rows of a table of a shape an operation looks up; None where it is not by these alone that it goes."""
    operation = operation_of(node)
    ids: Any = saved(node, "index" if operation == "IndexSelect" else "indices")
    if operation == "Embedding":
        plain = not saved(node, "scale_grad_by_freq")
    elif operation == "IndexSelect":
        plain = len(shape) == 2 and saved(node, "dim") == 0
    else:  # one of each dimension
        plain = len(shape) == 2 and len(ids) == 1 and ids[0] is not None and ids[0].dtype != torch.bool
        ids = ids[0].long() % shape[0] if plain else None
    found: Tensor | None = ids.long() if plain else None
    return found


def without_padding(node: Node, g: Tensor, ids: Tensor) -> Tensor:
    """The gradient on rows that were looked up, of which an embedding's padding gets nothing."""
    padding = signed(saved(node, "padding_idx")) if operation_of(node) == "Embedding" else -1
    return g * (ids != padding).unsqueeze(-1) if padding >= 0 else g
