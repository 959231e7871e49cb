"""The graph between a loss and the outputs that it is made of."""

import pytest
import torch
from torch import Tensor

from secorder._torch.graph import tells_recomputation
from secorder._torch.loss_graph import Place, place_of
from secorder.layers.layout import DIM_ZERO
from secorder.online.losses import seen
from secorder.online.losses.marks import Output
from secorder.online.losses.seen import roots_of, see

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")


def outputs(*counts: int) -> list[Tensor]:
    return [torch.randn(n, 3, requires_grad=True).exp() for n in counts]


def met(*made: Tensor) -> dict[int, dict[Place, Output | None]]:
    """Each of another forward."""
    return {i: {place_of(f): Output(DIM_ZERO, 1.0, len(f))} for i, f in enumerate(made)}


@pytest.mark.parametrize(
    ("counts", "joined", "groups"),
    [((4, 4), True, {0: 4}), ((4, 4), False, {0: 4, 1: 4}), ((4, 3), True, {0: 4, 1: 3})],
)
def test_what_belongs_together(counts: tuple[int, ...], joined: bool, groups: dict[int, int]) -> None:
    made = outputs(*counts)
    loss = see(roots_of([sum(f.sum() for f in made)], [None]), met(*made), joined=joined)
    assert loss is not None
    assert loss.groups == groups
    assert {own.group for own in loss.outputs.values()} == groups.keys()


def test_it_is_what_is_between_with_the_gradients_that_the_pass_begins_with() -> None:
    (f,) = outputs(4)
    whole, other = f.square().sum(), f.sum(1)
    loss = see(roots_of([whole, torch.ones(()), other], [None, None, torch.arange(4.0)]), met(f), joined=False)
    assert loss is not None
    assert {node.name() for node in loss.order} == {"SumBackward0", "PowBackward0", "SumBackward1"}
    (gradient,) = loss.gradients.values()
    torch.testing.assert_close(gradient, 2 * f + torch.arange(4.0)[:, None])


def test_of_one_sample_of_no_operation_or_too_much_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    (f,) = outputs(4)
    assert see(roots_of([f.sum()], [None]), met(f), joined=False)
    assert see(roots_of([f], [torch.ones(4, 3)]), met(f), joined=False) is None
    assert see(roots_of([f.sum()], [None]), {0: {place_of(f): None}}, joined=False) is None
    (one,) = outputs(1)
    assert see(roots_of([one.sum()], [None]), met(one), joined=False) is None
    monkeypatch.setattr(seen, "MOST_ELEMENTS", 0)
    monkeypatch.setattr(seen, "TIMES_OUTPUTS", 1)
    assert see(roots_of([f.exp().sum()], [None]), met(f), joined=False) is None
