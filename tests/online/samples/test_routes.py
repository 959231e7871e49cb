"""Rows that were selected by what depends on data are followed until they are put back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder.layers.selection import select_layers
from secorder.online.samples.hypotheses import Hypothesis, Trial
from secorder.online.samples.routes import routed_outputs

from ...helpers import Net


def routed_by_gate(m: Any, x: Tensor) -> Tensor:
    order = m.gate(x).argmax(1).nonzero()[:, 0]
    result = torch.zeros(len(x), 3, dtype=x.dtype)
    result[order] = m.expert(x[order])
    return m.head(result)


def sorted_and_back(m: Any, x: Tensor) -> Tensor:
    order = x.sum(1).argsort()
    return m.head(m.expert(x[order])[order.argsort()])


def by_constant_places(m: Any, x: Tensor) -> Tensor:
    return m.head(m.expert(x[:, :4]))


def added_within_samples(m: Any, x: Tensor) -> Tensor:
    """Messages along edges of a graph in each row."""
    target = x.argsort(1)[:, :, None].expand(-1, -1, 3)
    rows = m.expert(x[:, :, None].expand(-1, -1, 4))
    return m.head(torch.zeros_like(rows).scatter_add(1, target, rows))


def written_within_samples(m: Any, x: Tensor) -> Tensor:
    result = torch.zeros(len(x), 4, 3, dtype=x.dtype)
    result[:, x.argsort(1)[0]] = m.expert(x[:, :, None].expand(-1, -1, 4))
    return m.head(result)


def written_across_samples(m: Any, x: Tensor) -> Tensor:
    result = torch.zeros(len(x), 3, dtype=x.dtype)
    result[x.argsort(0)[:, 0]] = m.expert(x)
    return m.head(result)


def within_samples(*args: Any, **kwargs: Any) -> Callable[..., Tensor]:
    """The entries of each row in an order of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        order = x.argsort(1)
        return m.head(m.expert(torch.gather(x, *args, order, **kwargs) if args else x.gather(index=order, **kwargs)))

    return forward


def two_experts_a_row(back: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Each row twice, sorted by expert, and ``back``."""

    def forward(m: Any, x: Tensor) -> Tensor:
        order = m.gate(x).flatten().argsort()
        rows = m.expert(x[order // 2])
        return m.head(back(rows, order).view(len(x), 2, 3).sum(1))

    return forward


def by_inverse(rows: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return rows[inverse]


def into_places(rows: Tensor, order: Tensor) -> Tensor:
    result = torch.empty_like(rows)
    result[order] = rows
    return result


def stacked_experts(m: Any, x: Tensor) -> Tensor:
    order = m.gate(x).t().flatten().argsort()
    return m.head(by_inverse(m.expert(x[order % len(x)]), order).view(2, len(x), 3).sum(0))


def back_elsewhere(m: Any, x: Tensor) -> Tensor:
    order = m.gate(x).flatten().argsort()
    return m.head(m.expert(x[order // 2])[order])


def masked_by_lengths(m: Any, x: Tensor) -> Tensor:
    """One place of each row is marked, up to which it counts."""
    mask = torch.zeros(len(x), 4, dtype=x.dtype)
    mask[torch.arange(len(x)), x.argmax(1)] = 1
    rows = m.expert(x[:, :, None].expand(-1, -1, 4)) * mask.flip(1).cumsum(1).flip(1)[:, :, None]
    return m.head(rows)


def one_place_of_each_row_elsewhere(m: Any, x: Tensor) -> Tensor:
    """The same, of rows in an order that depends on data."""
    mask = torch.zeros(len(x), 4, dtype=x.dtype)
    mask[x.argsort(0)[:, 0], x.argmax(1)] = x[:, 0]
    return m.head(m.expert(mask))


def of_routed_rows_one_place_each(m: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(len(x), 4, dtype=x.dtype)
    mask[torch.arange(len(x)), x.argmax(1)] = x[x.argsort(0)[:, 0], 1]
    return m.head(m.expert(mask))


def several_places_of_each_row(m: Any, x: Tensor) -> Tensor:
    """The nearest points of each point, as of clouds."""
    rows = torch.arange(len(x)).type_as(x).long()[:, None].repeat(1, 3)
    near = x.argsort(1)[:, :3]
    mask = torch.zeros(len(x), 4, dtype=x.dtype)
    mask[torch.arange(len(x))[:, None], near] = x[rows, near]
    return m.head(m.expert(mask))


def several_places_of_rows_elsewhere(m: Any, x: Tensor) -> Tensor:
    return m.head(m.expert(x[x.argsort(0), x.argsort(1)]))


def one_after_another(m: Any, x: Tensor) -> Tensor:
    """The nearest points of each point, of clouds whose points stand in one long row."""
    near = x.argsort(1)[:, :3] + 4 * torch.arange(len(x))[:, None]
    points = m.expert(x.flatten()[near.flatten()].view(len(x), 3)[:, [0, 1, 2, 0]])
    mask = torch.zeros(x.numel(), dtype=x.dtype).scatter(0, near.view(-1), 1).view(len(x), 4)
    return m.head(points * mask[:, :3] * x.flatten().index_select(0, near.reshape(-1)).view(len(x), 3))


def one_after_another_of_others(m: Any, x: Tensor) -> Tensor:
    near = x.argsort(1) + 4 * torch.arange(len(x))[:, None]
    return m.head(m.expert(x.flatten()[(near + x.argsort(1)).flatten() % x.numel()].view(len(x), 4)))


def within_routed_rows(m: Any, x: Tensor) -> Tensor:
    order = m.gate(x).argmax(1).nonzero()[:, 0]
    rows = x[order]
    some = rows.sum(1).argsort()
    inner = torch.zeros(len(rows), 3, dtype=x.dtype)
    inner[some] = m.expert(rows[some])
    result = torch.zeros(len(x), 2, dtype=x.dtype)
    result[order] = m.head(inner)
    return result


def sorted_columns(m: Any, x: Tensor) -> Tensor:
    """Samples that stand in the second dimension, in an order that depends on data, and back."""
    order, rows = x.sum(1).argsort(), torch.arange(4)[:, None]
    columns = m.expert(x.repeat(4, 1, 1)[rows, order[None]])
    return m.head(columns[rows, order.argsort()[None]]).sum(0)


def sorted_columns_written_back(m: Any, x: Tensor) -> Tensor:
    order, rows = x.sum(1).argsort(), torch.arange(4)[:, None]
    columns = m.expert(x.repeat(4, 1, 1).index_select(1, order))
    result = torch.zeros(4, len(x), 3, dtype=x.dtype)
    result[rows, order[None]] = columns
    return m.head(result + torch.zeros_like(result).index_copy(1, order, columns)).sum(0)


def in_a_new_dimension(m: Any, x: Tensor) -> Tensor:
    """What stands before the indices takes none of the dimensions that they select from."""
    order = x.sum(1).argsort()
    return m.head(m.expert(x[None, order])[..., order.argsort(), :][0])


def within_rows_behind_others(m: Any, x: Tensor) -> Tensor:
    """Entries of samples that stand in the second dimension."""
    return m.head(m.expert(x.repeat(4, 1, 1)[..., x.argsort(1)[0]])).sum(0)


def as_many_as_data_keeps(m: Any, x: Tensor) -> Tensor:
    """Of indices within rows some, which may be all by chance."""
    near = x.argsort(1) + 4 * torch.arange(len(x))[:, None]
    kept = near[x > -1e9]
    rows = m.expert(x.flatten()[kept][:, None].expand(-1, 4))
    return m.head(torch.zeros(x.numel(), 3, dtype=x.dtype).index_add(0, kept, rows).view(len(x), 4, 3)).sum(1)


def across_samples(m: Any, x: Tensor) -> Tensor:
    return m.head(m.expert(torch.gather(x, index=x.argsort(0), dim=-2)))


@pytest.mark.parametrize(
    ("forward", "routed"),
    [
        (routed_by_gate, {"expert"}),
        (sorted_and_back, {"expert"}),
        (by_constant_places, set()),
        (within_samples(1), set()),
        (within_samples(-1), set()),
        (within_samples(dim=1), set()),
        (within_samples(dim=-1), set()),
        (two_experts_a_row(by_inverse), {"expert"}),
        (two_experts_a_row(into_places), {"expert"}),
        (stacked_experts, {"expert"}),
        (back_elsewhere, {"expert", "head"}),
        (within_routed_rows, {"expert", "head"}),
        (added_within_samples, set()),
        (written_within_samples, set()),
        (written_across_samples, {"head"}),
        (across_samples, {"expert", "head"}),
        (masked_by_lengths, set()),
        (one_place_of_each_row_elsewhere, {"expert", "head"}),
        (of_routed_rows_one_place_each, {"expert", "head"}),
        (several_places_of_each_row, set()),
        (several_places_of_rows_elsewhere, {"expert", "head"}),
        (one_after_another, set()),
        (one_after_another_of_others, {"expert", "head"}),
        (sorted_columns, {"expert", "head"}),
        (sorted_columns_written_back, {"expert"}),
        (in_a_new_dimension, {"expert"}),
        (within_rows_behind_others, set()),
        (as_many_as_data_keeps, {"expert"}),
    ],
)
def test_layers_of_rows_that_no_shape_tells_of(forward: Callable[..., Tensor], routed: set[str]) -> None:
    model = Net(forward, gate=nn.Linear(4, 2), expert=nn.Linear(4, 3), head=nn.Linear(3, 2))
    x = torch.randn(6, 4)

    def run(arguments: Any, begin: Callable[[Any], None]) -> Any:
        begin(arguments)
        return model(*arguments[0])

    found = routed_outputs(select_layers(model), Trial(run, ((x,), {}), Hypothesis((0,), 6)))
    assert found == {name: {0} for name in routed}
