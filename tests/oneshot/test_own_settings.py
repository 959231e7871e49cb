"""The settings that passes of our own run under."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from secorder import CurvatureProbe
from secorder.oneshot.own_settings import as_written, own_settings


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_taken_whatever_the_users_settings_are(training: bool) -> None:
    model = nn.Linear(3, 2)
    with torch.inference_mode(), torch.autocast("cpu"):
        with own_settings(model, training=training):
            found = model(torch.randn(4, 3))
            assert found.requires_grad
            assert found.dtype is model.weight.dtype
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")


def test_a_probe_does_not_see_what_runs_inside() -> None:
    model = nn.Linear(3, 2)
    with CurvatureProbe(model) as probe:
        with own_settings(model, training=False):
            model(torch.randn(4, 3)).sum().backward()
        assert not probe.num_samples
        model(torch.randn(4, 3)).sum().backward()
        assert probe.num_samples == 4


def test_parametrizations_are_computed_anew_and_attention_can_be_differentiated_twice() -> None:
    model = nn.Linear(3, 2)
    parametrize.register_parametrization(model, "weight", _Twice())
    with parametrize.cached():
        before = model.weight
        with as_written(model, training=False):
            assert model.weight is not before
            q = torch.randn(1, 1, 4, 8, requires_grad=True)
            z = nn.functional.scaled_dot_product_attention(q, q, q)
            (g,) = torch.autograd.grad(z.square().sum(), q, create_graph=True)
            assert torch.autograd.grad(g.sum(), q)[0].isfinite().all()
        assert model.weight is before


@pytest.mark.parametrize("settings", [own_settings, as_written])
def test_settings_are_put_back_after_an_error(settings: Callable[..., AbstractContextManager[None]]) -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad(), pytest.raises(ValueError, match="within"), settings(model, training=False):
        raise ValueError("within")
    assert torch.is_grad_enabled()


class _Twice(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w
