"""What surrounds a call sees nothing of passes of our own."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from secorder._torch.surroundings import (
    assigned,
    attention_kernels,
    inside_transform,
    lasting,
    parametrizations_computed_anew,
    unseen,
)


def test_hooks_on_saved_tensors_and_modes_are_put_aside_and_back() -> None:
    saved: list[tuple[str, Tensor]] = []
    x = torch.randn(3, 3, requires_grad=True)

    def packs(name: str) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((name, t)) or t, lambda t: t)

    with packs("outer"), packs("inner"), FlopCounterMode(display=False) as counter:
        with unseen():
            x.mm(x)
        assert not saved
        assert counter.get_total_flops() == 0
        x.mm(x)
        assert counter.get_total_flops() == 54
    with packs("outer"):
        with packs("inner"), unseen():
            pass
        x.mm(x)
    assert [name for name, _ in saved] == ["inner"] * 2 + ["outer"] * 2


def test_attributes_have_their_values_again_after_an_exception() -> None:
    layers = [nn.Linear(1, 1), nn.Linear(1, 1).eval()]

    def fails() -> None:
        with assigned(layers, training=False, in_features=3):
            assert not any(layer.training for layer in layers)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [(layer.training, layer.in_features) for layer in layers] == [(True, 1), (False, 1)]


def test_nothing_is_taken_from_the_cache_of_parametrizations_or_put_there() -> None:
    layer = weight_norm(nn.Linear(3, 2))
    with parametrize.cached():
        with parametrizations_computed_anew():
            other = layer.weight
            assert layer.weight is not other
        kept = layer.weight
        assert kept is not other
        with parametrizations_computed_anew():
            assert layer.weight is not kept
        assert layer.weight is kept


def test_what_is_made_can_be_added_to_elsewhere() -> None:
    with torch.inference_mode():
        with lasting():
            made = torch.ones(2)
            assert not torch.is_grad_enabled()
        assert torch.is_inference(torch.ones(2))
    assert made.add_(1).tolist() == [2.0, 2.0]


def test_transforms_are_seen_from_inside() -> None:
    found: list[bool] = []

    def function(x: Tensor) -> Tensor:
        found.append(bool(inside_transform()))
        return x.sum()

    x = torch.ones(3)
    function(x)
    torch.func.vmap(function)(x)
    torch.func.grad(function)(x)
    torch.func.jvp(function, (x,), (x,))
    assert found == [False, True, True, True]
    assert not inside_transform()


def test_the_kernels_of_now() -> None:
    everywhere = attention_kernels()
    assert SDPBackend.MATH in everywhere
    for kernels in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        with sdpa_kernel(kernels):
            assert set(attention_kernels()) == set(kernels)
    assert attention_kernels() == everywhere
