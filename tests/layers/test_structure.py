"""What the structure of a model tells for certain, and that doubt is told as doubt."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.overrides import TorchFunctionMode

from secorder import CurvatureProbe
from secorder.layers.structure import independent_by_structure, linear_by_structure, pure_by_structure

from ..helpers import Fn

CHAIN = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(8, 4)), nn.LayerNorm(4))


def test_a_chain_of_layers_that_treat_rows_alone() -> None:
    assert independent_by_structure(CHAIN)
    assert not independent_by_structure(CHAIN, sample_dim=1)
    with CurvatureProbe(CHAIN):  # hooks of the library's own change nothing
        assert independent_by_structure(CHAIN)


class Mixing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean(0)


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval(), nn.Flatten(0), nn.Softmax(0),
     nn.LSTM(4, 4), Mixing(4, 4), Fn(torch.tanh)],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_what_may_mix_samples(module: nn.Module) -> None:
    assert not independent_by_structure(nn.Sequential(nn.Linear(4, 4), module))


def test_batch_normalisation_by_running_statistics() -> None:
    assert independent_by_structure(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval())


def test_a_users_hook_or_another_forward_may_do_anything() -> None:
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    assert not independent_by_structure(hooked)
    replaced = nn.Sequential(nn.Linear(4, 4))
    replaced[0].forward = lambda x: x - x.mean(0)
    assert not independent_by_structure(replaced)


def _less_the_mean(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output - output.mean(0)


def _watched(module: nn.Module, inputs: object, outputs: object) -> None:
    """Attributions at gradients, as far as one can tell."""


@pytest.mark.parametrize(
    ("register", "hook"),
    [(register_module_forward_hook, _less_the_mean), (register_module_full_backward_hook, _watched)],
    ids=["forward", "backward"],
)
def test_so_may_a_hook_on_all_modules(register: Callable[..., object], hook: Callable[..., object]) -> None:
    handle = register(hook)
    try:
        assert not independent_by_structure(CHAIN)
    finally:
        handle.remove()
    assert independent_by_structure(CHAIN)
    with torch.device("cpu"):  # a mode, too, of which `torch.set_default_device` enters one for good
        assert independent_by_structure(CHAIN)
        assert pure_by_structure(CHAIN)


def _with_a_weight_from_elsewhere() -> nn.Module:
    layer = nn.Linear(4, 4)
    del layer.weight
    layer.weight = torch.randn(4, 4)
    return layer


@pytest.mark.parametrize(
    ("module", "pure"),
    [(nn.ReLU(), True), (nn.ReLU(inplace=True), False), (nn.Dropout(), False), (nn.Dropout().eval(), True),
     (nn.Embedding(3, 4), True), (nn.Embedding(3, 4, max_norm=1.0), False), (_with_a_weight_from_elsewhere(), False)],
    ids=["relu", "in place", "dropout", "dropout in eval mode", "embedding", "max_norm", "weight from elsewhere"],
)  # fmt: skip
def test_what_a_forward_leaves_as_it_was(module: nn.Module, pure: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), module)
    assert independent_by_structure(model)
    assert pure_by_structure(model) is pure
    with TorchFunctionMode():  # which may do anything at any call
        assert not pure_by_structure(model)


def test_piecewise_linear_after_a_module() -> None:
    convolution, inner, norm = CHAIN[0], CHAIN[2][1], CHAIN[3]
    assert not linear_by_structure(CHAIN, convolution)  # the layer normalisation comes after
    assert not linear_by_structure(CHAIN, inner)
    assert linear_by_structure(CHAIN, norm)
    assert linear_by_structure(CHAIN[:3], convolution)
    assert linear_by_structure(norm, norm)
    twice = nn.Sequential(inner, nn.ReLU(), inner)
    assert not linear_by_structure(twice, inner)
    assert not linear_by_structure(CHAIN[:2], inner)  # which is not in it
