"""Which dimension holds the samples: told or supposed, and held against the model."""

import pytest
import torch
from torch import nn

from secorder import InvalidArgumentError
from secorder._torch.graph import tells_recomputation
from secorder.layers.layout import Layout
from secorder.oneshot.independence import separating_masks
from secorder.online.samples.hypotheses import (
    Hypothesis,
    Trial,
    any_layout,
    check_sample_dim,
    from_names,
    hypotheses,
    separates,
    shapes_of,
)


@pytest.mark.parametrize("wrong", [-1, True, 1.0, {"x": -1}, {"x": "0"}])
def test_dimensions_that_are_none(wrong: object) -> None:
    with pytest.raises(InvalidArgumentError, match="sample_dim"):
        check_sample_dim(wrong)  # type: ignore[arg-type]


def test_a_mapping_is_by_the_names_of_the_arguments() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            return x

    x, state = torch.randn(6, 4), torch.randn(2, 6, 3)
    found = from_names(Two(), (x,), {"state": state}, {"x": 0, "state": 1})
    assert found.dims == (0, 1)
    assert found.num_samples == 6
    with pytest.raises(InvalidArgumentError, match="names"):
        from_names(Two(), (x, state), {}, {"y": 0})
    with pytest.raises(InvalidArgumentError, match="sizes"):
        from_names(Two(), (x, state), {}, {"x": 0, "state": 0})


def test_the_usual_hypothesis_comes_first() -> None:
    found = hypotheses(((torch.randn(6, 4),), {}), [torch.randn(6, 3)], None)
    assert (found[0].dims, found[0].num_samples) == ((0,), 6)


def test_layouts_and_shapes() -> None:
    assert any_layout(torch.zeros(6, 4), 6) == [Layout(0)]
    assert set(any_layout(torch.zeros(12, 6), 6)) == {Layout(1), Layout(0, 2, True), Layout(0, 2, False)}
    assert shapes_of(((torch.zeros(2, 3),), {"y": [torch.zeros(4)]})) == ((2, 3), (4,))


def test_samples_that_all_influence_one_another_are_given_up_after_two_passes() -> None:
    passes = 0

    def forward(arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return arguments[0].cumsum(0) + arguments[0].sum()

    x, masks = torch.randn(16, 4), list(separating_masks(16))
    assert len(masks) > 2
    assert separates(Trial(forward, (x,), Hypothesis((0,), 16)), [forward((x,))], masks) is None
    assert passes - 1 == (2 if tells_recomputation() else 1)
