"""The Fisher on the parameters themselves, sample by sample, for layers without a rule, or with other uses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch.vjp import chunks, default_chunk_size
from ..layers.dtypes import compute_dtype
from ..layers.selection import Layer
from ..monitor.progress import progress_bar
from ..results import Strategy
from .cotangents import pull_back
from .fisher_by_uses import by_uses
from .fisher_pairs import Found, collect
from .measurement import Measurement
from .output_hessian import output_points
from .roots import Columns


def without_rules(task: Measurement, layers: Sequence[Layer], pairs: Columns, *, by_graph: bool) -> Found:
    """By the uses of their parameters, where the graph is followed and tells them; else sample by sample."""
    found = by_uses(task, layers, pairs) if layers and by_graph else {}
    rest = [x for x in layers if x.name not in found]
    return found | (by_samples(task, rest, pairs) if rest else {})


def by_samples(task: Measurement, layers: Sequence[Layer], pairs: Columns) -> Found:
    """On the parameters: one vjp a sample and pair, on one graph of the whole batch."""
    model_outputs = output_points(task.isolated.forward(task.inputs), task.dimension)
    replacements = [s for layer in layers for s in task.isolated.replacements(layer)]
    totals = [
        torch.zeros_like(s, dtype=compute_dtype(layer)) for layer in layers for s in task.isolated.replacements(layer)
    ]
    elements = sum(s.numel() for s in replacements) + 4 * sum(f.numel() for f in model_outputs)
    size = default_chunk_size(elements, totals[0], task.chunk_size)

    def pulled_back(cotangent: Tensor, ids: range) -> list[Tensor]:
        alone = cotangent.new_zeros(len(ids), *cotangent.shape)
        alone[range(len(ids)), list(ids)] = cotangent[ids.start : ids.stop]
        found = pull_back(model_outputs, replacements, alone, task.create_graph)
        return [found[id(s)].to(total.dtype) for s, total in zip(replacements, totals, strict=True)]

    total = pairs.num_columns * task.num_samples
    with progress_bar(task.progress, "Fisher sample by sample", total, unit="vjps") as advance:
        for k in range(pairs.num_columns):
            some = pairs.columns(range(k, k + 1))
            for ids in chunks(task.num_samples, size):
                left = pulled_back(some.u[0], ids)
                right = left if some.v is None else pulled_back(some.v[0], ids)
                sign = None if some.sign is None else some.sign[0, ids.start : ids.stop]
                for index, (u, v) in enumerate(zip(left, right, strict=True)):
                    weighted = v if sign is None else v * sign.view(-1, *(1,) * (v.dim() - 1))
                    totals[index] = totals[index] + (u * weighted).sum(0)
                advance(len(ids))
    return collect(layers, totals, Strategy.PER_SAMPLE, task.num_samples)
