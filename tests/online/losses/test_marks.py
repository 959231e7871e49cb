"""Where a loss meets what a forward has made: outputs of the model, or of layers that it takes past these."""

from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder._torch.graph import tells_recomputation
from secorder._torch.loss_graph import place_of
from secorder.layers.layout import DIM_ZERO
from secorder.online.losses.marks import mark_calls, mark_outputs, outputs_behind
from secorder.online.record import ForwardRecord
from secorder.online.samples.attribution import Attribution

from ...helpers import make

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")


class Owner:
    """An attachment."""


def forward(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """An inner tensor, what is made of it, and the square of that."""
    h = torch.randn(count, 3, requires_grad=True).tanh()
    f = h.exp()
    return h, f, f.square()


def record(count: int = 4) -> ForwardRecord:
    made = ForwardRecord(Attribution(), count, (), verified=True, scheduled=True)
    made.layers["a"].layouts = [[DIM_ZERO]]
    return made


def test_layers_are_met_where_a_loss_goes_past_the_models_outputs() -> None:
    owner, own, (h, f, _) = Owner(), record(), forward()
    mark_calls(owner, own, "a", 0, [place_of(h)])
    assert mark_outputs(owner, own, f, [DIM_ZERO])
    for loss, met in ((f.sum(), {place_of(f)}), (h.sum() + f.sum(), {place_of(h), place_of(f)})):
        found = outputs_behind([loss.grad_fn], owner)
        assert set(found[id(own)]) == met
        assert all(output is not None and output.num_samples == 4 for output in found[id(own)].values())
    assert not outputs_behind([f.sum().grad_fn], Owner())


def test_behind_an_output_of_which_too_little_is_known_layers_are_the_models_own() -> None:
    """Such as a loss that it returns: only what it returned besides is looked for there."""
    owner, own, (h, f, loss) = Owner(), record(), forward()
    mark_calls(owner, own, "a", 0, [place_of(h)])
    mark_outputs(owner, own, [f, loss.sum()], [DIM_ZERO, None])
    total = loss.sum()
    mark_outputs(owner, own, total, [None])
    assert outputs_behind([total.grad_fn], owner)[id(own)][place_of(f)] is not None
    assert place_of(h) not in outputs_behind([total.grad_fn], owner)[id(own)]


def test_what_is_known_as_an_output_stays_one() -> None:
    """A layer that is measured by the whole model, of whose calls less is known, returns the model's outputs."""
    owner, own, (_, f, _) = Owner(), record(), forward()
    mark_outputs(owner, own, f, [DIM_ZERO])
    mark_calls(owner, own, "b", 0, [f])
    assert outputs_behind([f.sum().grad_fn], owner)[id(own)][place_of(f)] is not None


def test_of_an_output_of_which_nothing_is_known_the_layer_that_returns_it_tells() -> None:
    """Such as one more than the batches had that were looked at."""
    owner, own, (_, f, _) = Owner(), record(), forward()
    mark_outputs(owner, own, f, [])
    mark_calls(owner, own, "a", 0, [f])
    assert outputs_behind([f.sum().grad_fn], owner)[id(own)][place_of(f)] is not None


def test_marks_keep_no_record_and_end_with_the_graph() -> None:
    owner, own, (h, _, _) = Owner(), record(), forward()
    mark_calls(owner, own, "a", 0, [place_of(h)])
    seen = ref(own)
    del own
    assert seen() is None
    assert all(x is None for outputs in outputs_behind([h.sum().grad_fn], owner).values() for x in outputs.values())


@pytest.mark.parametrize("steps", [1, 3])
def test_a_batch_that_is_not_looked_at_is_not_marked(steps: int) -> None:
    model: Any = make()
    kept: list[Tensor] = []
    assert isinstance(model, nn.Sequential)
    with CurvatureProbe(model, reduction="mean"):
        for _ in range(steps):
            z = model(torch.randn(6, 4))
            kept.append(z)
            z.square().sum(1).mean().backward()
    assert bool(kept[-1].grad_fn and kept[-1].grad_fn.metadata) is (steps == 1)


def test_the_size_of_an_output_is_that_of_what_is_finite_of_it() -> None:
    f = torch.tensor([[3.0, 4.0], [5.0, 0.0]], requires_grad=True).clone()
    owner, kept = Owner(), record(2)
    for spoilt, size in ((0.0, 12.5), (torch.inf, 50 / 3), (torch.nan, 50 / 3)):
        values = f.where(f != 0, spoilt)
        mark_outputs(owner, kept, values, [DIM_ZERO])
        (output,) = outputs_behind([values.grad_fn], owner)[id(kept)].values()
        assert output is not None
        assert output.size == pytest.approx(size**0.5)
