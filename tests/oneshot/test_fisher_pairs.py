"""Pairs that make the Hessian of each sample's loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder.layers.selection import select_layers
from secorder.oneshot.fisher_pairs import Asked, collect, second_order_columns
from secorder.oneshot.measurement import Measurement
from secorder.results import Strategy

from ..helpers import data, make, measured


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_pairs_add_up_to_the_hessian(fisher_type: Any, create_graph: bool) -> None:
    batch = data()

    def work(task: Measurement) -> tuple[Tensor, Tensor]:
        output, _ = task.loss()
        point = output.detach().requires_grad_()
        losses = F.cross_entropy(point, task.targets, reduction="sum")
        g = torch.autograd.grad(losses, point, create_graph=True)
        found = second_order_columns(task, g, [point], Asked(fisher_type, 4000))
        some = found.columns(range(found.num_columns))
        v = some.u if some.v is None else some.v
        u = some.u if some.sign is None else some.u * some.sign[..., None]
        return torch.einsum("kni,knj->nij", u, v).detach(), point.detach().softmax(1)

    total, p = measured(work, make(), batch, create_graph=create_graph)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert (total - expected).abs().amax() < (1e-12 if fisher_type == "type-2" else 0.05)


def test_totals_are_put_together_by_layer() -> None:
    layers = select_layers(make())
    totals = [torch.full(p.shape, 2.0 * i) for i, p in enumerate(p for x in layers for p in x.parameters.values())]
    found = collect(layers, totals, Strategy.RULE, 2)
    assert {name: [int(v[0]) for v in values] for name, (values, _) in found.items()} == {"0": [0, 1], "2": [2, 3]}
    assert all(info.strategy == Strategy.RULE for _, info in found.values())
