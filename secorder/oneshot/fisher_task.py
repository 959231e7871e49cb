"""One measurement of a Fisher: what was asked for, and the pairs of cotangents that make it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._torch.pytree import map_tensors
from ..batch import sample_dimension
from ..layers.selection import Layer
from ..results import LayerInfo
from .output_hessian import (
    Pairs,
    known_roots,
    output_hessian,
    signed_roots,
)

__all__ = ["FisherType", "Found", "Task", "collect", "second_order_pairs"]

FisherType = Literal["empirical", "type-2", "mc"]


@dataclass(frozen=True)
class Task:
    """One measurement, as asked for."""

    model: nn.Module
    layers: Sequence[Layer]
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Any
    targets: Any
    count: int
    sample_dim: int
    fisher_type: FisherType
    num_draws: int
    generator: torch.Generator
    create_graph: bool
    chunk_size: int | None
    autocast: bool
    certain: bool  # samples are independent by the model's structure

    def dimension(self, tensor: Tensor) -> int | None:
        """Where a tensor's samples are; what has none is shared by all samples."""
        return sample_dimension(tensor, self.count, self.sample_dim)

    def cut(self, tree: Any, index: int, *, rows: bool = False) -> Any:
        """The batch that holds one sample alone.

        With ``rows``, tensors may hold several rows a sample in dim 0, sample after sample (a label for each token).
        """

        def one(tensor: Tensor) -> Tensor:
            dim = self.dimension(tensor)
            if dim is not None:
                return tensor.narrow(dim, index, 1)
            if rows and tensor.dim() and tensor.shape[0] % self.count == 0:
                size = tensor.shape[0] // self.count
                return tensor.narrow(0, index * size, size)
            return tensor

        return map_tensors(one, tree)


Found = dict[str, tuple[list[Tensor], LayerInfo]]


def second_order_pairs(task: Task, output_gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> Pairs:
    if task.create_graph:  # a square root is not differentiable where eigenvalues meet: u = e_c, v = H e_c
        hessian = output_hessian(output_gradients, points, task.chunk_size, create_graph=True)
        eye = torch.eye(hessian.shape[-1]).to(hessian)
        pairs = Pairs(eye[:, None].expand(-1, len(hessian), -1), hessian.permute(1, 0, 2))
    else:
        pairs = known_roots(output_gradients, points) or signed_roots(output_gradients, points, task.chunk_size)
    return pairs if task.fisher_type == "type-2" else _drawn(task, pairs)


def _drawn(task: Task, pairs: Pairs) -> Pairs:
    """Monte Carlo: random signs mix all columns into one pair, drawn anew for each sample and draw."""
    shape = (task.num_draws, *pairs.u.shape[:2])
    signs = torch.randint(0, 2, shape, generator=task.generator, device=task.generator.device)
    signs = (signs * 2 - 1).to(pairs.u) / task.num_draws**0.5
    u = torch.einsum("mkn,kno->mno", signs, pairs.u)
    other = pairs.v if pairs.sign is None else pairs.u * pairs.sign[..., None]
    return Pairs(u, None if other is None else torch.einsum("mkn,kno->mno", signs, other))


def collect(layers: Sequence[Layer], totals: Sequence[Tensor], strategy: str) -> Found:
    rest = iter(totals)
    return {layer.name: ([next(rest).flatten() for _ in layer.parameters], LayerInfo(strategy)) for layer in layers}
