"""Per-sample gradients in each of their forms, and the same written out by loops."""

import torch
from torch import Tensor

from secorder.layers.per_sample import Outer, PerSample, Rows

N = 5
SIZE = 6 * 4
NAMES = ("one_position", "positions", "groups", "bias", "rows", "dense")


def form(name: str) -> PerSample:
    """One of :data:`NAMES`, of :data:`N` samples and a parameter of :data:`SIZE` elements, other numbers each time."""
    match name:
        case "one_position":
            return Outer(torch.randn(N, 1, 1, 4), torch.randn(N, 1, 1, 6))
        case "positions":
            return Outer(torch.randn(N, 1, 7, 4), torch.randn(N, 1, 7, 6))
        case "groups":
            return Outer(torch.randn(N, 2, 7, 4), torch.randn(N, 2, 7, 3))
        case "bias":
            return Outer(None, torch.randn(N, 1, 7, SIZE))
        case "rows":
            return Rows(torch.randint(6, (N, 9)), torch.randn(N, 9, 4), 6)
        case _:
            return torch.randn(N, 6, 4)


def written_out(gradient: PerSample) -> Tensor:
    """Sample by sample and position by position, shape (N, :data:`SIZE`)."""
    if isinstance(gradient, Tensor):
        return gradient.flatten(1)
    rows = []
    for n in range(len(gradient.g)):
        total = torch.zeros(6, 4)
        if isinstance(gradient, Rows):
            for index, g in zip(gradient.ids[n], gradient.g[n], strict=True):
                total[index] += g
        elif gradient.a is None:
            total = sum(gradient.g[n, 0])
        else:
            blocks = [
                sum(torch.outer(g, a) for g, a in zip(gradient.g[n, i], gradient.a[n, i], strict=True))
                for i in range(gradient.g.shape[1])
            ]
            total = torch.cat(blocks)
        rows.append(total.flatten())
    return torch.stack(rows)
