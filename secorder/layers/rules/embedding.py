"""Embeddings."""

from torch import Tensor, nn

from ..per_sample import PerSample, Rows
from .registry import rule_of


@rule_of(nn.Embedding, parameters=("weight",), any_leading_dim=True)
def embedding(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = rows of the table: each row gets the sum of the cotangents where it was looked up."""
    assert isinstance(module, nn.Embedding)
    ids = inputs[0].long()
    ids = ids.flatten(1) if ids.dim() > 1 else ids[:, None]
    if module.padding_idx is not None:
        g = g * (inputs[0] != module.padding_idx).unsqueeze(-1)
    return {"weight": Rows(ids, g.reshape(*ids.shape, g.shape[-1]), module.num_embeddings)}
