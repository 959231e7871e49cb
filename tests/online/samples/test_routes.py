"""Rows that were selected by what depends on data are followed until they are put back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder.layers.selection import select_layers
from secorder.online.samples.hypotheses import Hypothesis
from secorder.online.samples.routes import Selections, layers_of_routed_rows

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


def within_samples(*args: Any, **kwargs: Any) -> Callable[..., Tensor]:
    """The entries of each row in an order of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        order = x.argsort(1)
        return m.head(m.expert(torch.gather(x, *args, order, **kwargs) if args else x.gather(index=order, **kwargs)))

    return forward


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
        (across_samples, {"expert", "head"}),
    ],
)
def test_layers_of_rows_that_no_shape_tells_of(forward: Callable[..., Tensor], routed: set[str]) -> None:
    model = Net(forward, gate=nn.Linear(4, 2), expert=nn.Linear(4, 3), head=nn.Linear(3, 2))
    x = torch.randn(6, 4)

    def run(arguments: Any, begin: Callable[[Any], None]) -> Any:
        begin(arguments)
        return model(*arguments[0])

    found = layers_of_routed_rows(select_layers(model), run, ((x,), {}), Hypothesis((0,), 6))
    assert found == routed


def test_selections_by_tensors_are_counted() -> None:
    x = torch.randn(3, 4)
    with Selections() as selections:
        x[0], x[:, 1:]
        assert selections.count == 0
        x[torch.tensor([0, 1])]
        x.nonzero()
    assert selections.count == 2
