"""Calls of layers: what is kept of them, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CurvatureProbe, CurvatureWarning

from ..helpers import Exponential, Net, data, no_warnings, reference, step
from ..reference import PLAIN_CHECKPOINTS, assert_all_close


def test_an_input_that_is_overwritten_before_backward_is_refused() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = x * 1
        out = m.fc(hidden)
        with torch.no_grad():
            hidden.add_(1)
        return out

    model, batch = Net(forward, fc=nn.Linear(4, 3)), data()
    model.fc.weight.requires_grad_(False)  # so that autograd itself does not need the input
    with CurvatureProbe(model) as probe:
        with pytest.warns(CurvatureWarning, match="overwritten in place"):
            step(model, batch)
        with pytest.raises(AttributionError, match="overwritten in place"):
            probe.fisher_diagonal()


def test_calls_with_keywords_and_several_calls() -> None:
    model = Net(lambda m, x: m.fc(input=torch.tanh(m.fc(x))), fc=nn.Linear(4, 4))
    batch = data()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


class _Checkpointed(nn.Module):
    """A scale that goes through a function of the user's own, which no operation tells of, inside of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.randn(5))
        self.whole = self.opaque = False

    def _body(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.b(torch.tanh(self.a(x)))) * (Exponential.apply(self.scale) if self.opaque else 1)
        return self.head(hidden) if self.whole else hidden

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self._body, x.clone().requires_grad_(), use_reentrant=True)
        return out if self.whole else self.head(out)


@pytest.mark.parametrize("whole", [False, True])
def test_a_module_that_runs_again_whose_parameters_get_their_gradient_in_a_checkpoint_of_the_reentrant_kind(
    whole: bool,
) -> None:
    model, batch = _Checkpointed(), data()
    model.whole, model.opaque = whole, True
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        with no_warnings():
            step(model, batch)
        found = probe.fisher_diagonal()
    assert found.info[""].measured_by == "rerun"
    with PLAIN_CHECKPOINTS:
        assert_all_close(found.by_parameter(), reference(model, batch))


@pytest.mark.parametrize("frozen", [("head",), ("a", "b"), ("b", "head")])
def test_frozen_layers_around_and_inside_of_a_checkpoint_of_the_reentrant_kind(frozen: tuple[str, ...]) -> None:
    model, batch = _Checkpointed(), data()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    with CurvatureProbe(model, reduction="mean", frozen=True) as probe:
        with no_warnings():
            step(model, batch)
        found = probe.fisher_diagonal().by_parameter()
    with PLAIN_CHECKPOINTS:
        expected = reference(model, batch)
    del expected["scale"]
    assert_all_close(found, expected)
