"""Rows that are looked up in a table."""

import torch
from torch import Tensor

from ..per_sample import PerSample, Rows
from .call import OperationCall
from .registry import operation_rule


@operation_rule("EmbeddingBackward0")
def embedding(call: OperationCall, _: int) -> PerSample | None:
    """Rows of a table, of which the padding's gets nothing."""
    if call.saved("scale_grad_by_freq"):
        return None
    return _rows(call, call.saved("indices"), call.saved("padding_idx"))


@operation_rule("IndexBackward0")
def index(call: OperationCall, _: int) -> PerSample | None:
    """``table[ids]``, by the first dimension alone."""
    ids = call.saved("indices")
    if len(ids) != 1 or ids[0] is None or ids[0].dtype == torch.bool or len(call.shape(0)) != 2:
        return None
    return _rows(call, ids[0] % call.shape(0)[0])


@operation_rule("IndexSelectBackward0")
def index_select(call: OperationCall, _: int) -> PerSample | None:
    """``table.index_select(0, ids)``."""
    if call.saved("dim") != 0 or len(call.shape(0)) != 2:
        return None
    return _rows(call, call.saved("index"))


def _rows(call: OperationCall, ids: Tensor, padding: int = -1) -> PerSample | None:
    if call.layout.dim >= ids.dim():
        return None
    g = call.g
    if 0 <= padding < 2**63 - 1:
        g = g * (ids != padding).unsqueeze(-1)
    found, g = call.layout.split(ids.long()), call.layout.split(g)
    found = found.flatten(1) if found.dim() > 1 else found[:, None]
    return Rows(found, g.reshape(*found.shape, g.shape[-1]), call.shape(0)[0])
