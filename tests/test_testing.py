"""The check of rules: passes the library's own, and sees what is wrong with others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import InvalidArgumentError, InvalidTypeError, RuleError
from secorder.layers.per_sample import Outer
from secorder.layers.rules import RULES
from secorder.layers.rules.linear import linear
from secorder.testing import check_rule

MODULES: dict[type[nn.Module], Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    nn.Linear: lambda: (nn.Linear(3, 2), (torch.randn(4, 5, 3),)),
    nn.Conv1d: lambda: (nn.Conv1d(2, 4, 3, groups=2), (torch.randn(3, 2, 6),)),
    nn.Conv2d: lambda: (nn.Conv2d(2, 3, (2, 3), padding=1, stride=2), (torch.randn(3, 2, 5, 5),)),
    nn.Conv3d: lambda: (nn.Conv3d(1, 2, 2), (torch.randn(2, 1, 3, 3, 3),)),
    nn.ConvTranspose1d: lambda: (nn.ConvTranspose1d(2, 3, 3, stride=2), (torch.randn(3, 2, 4),)),
    nn.ConvTranspose2d: lambda: (nn.ConvTranspose2d(2, 4, 2, groups=2), (torch.randn(3, 2, 3, 3),)),
    nn.ConvTranspose3d: lambda: (nn.ConvTranspose3d(1, 2, 2), (torch.randn(2, 1, 2, 2, 2),)),
    nn.LayerNorm: lambda: (nn.LayerNorm(4), (torch.randn(3, 2, 4),)),
    nn.RMSNorm: lambda: (nn.RMSNorm(4), (torch.randn(3, 2, 4),)),
    nn.GroupNorm: lambda: (nn.GroupNorm(2, 4), (torch.randn(3, 4, 5),)),
    nn.InstanceNorm1d: lambda: (nn.InstanceNorm1d(3, affine=True), (torch.randn(2, 3, 4),)),
    nn.InstanceNorm2d: lambda: (nn.InstanceNorm2d(3, affine=True), (torch.randn(2, 3, 3, 2),)),
    nn.InstanceNorm3d: lambda: (nn.InstanceNorm3d(2, affine=True), (torch.randn(2, 2, 2, 2, 2),)),
    nn.BatchNorm1d: lambda: (nn.BatchNorm1d(3).eval(), (torch.randn(4, 3),)),
    nn.BatchNorm2d: lambda: (nn.BatchNorm2d(3).eval(), (torch.randn(4, 3, 2, 2),)),
    nn.BatchNorm3d: lambda: (nn.BatchNorm3d(2).eval(), (torch.randn(4, 2, 2, 2, 2),)),
    nn.Embedding: lambda: (nn.Embedding(5, 3, padding_idx=0), (torch.randint(5, (3, 6)),)),
    nn.PReLU: lambda: (nn.PReLU(3), (torch.randn(4, 3, 2),)),
    nn.Bilinear: lambda: (nn.Bilinear(3, 2, 4), (torch.randn(4, 3), torch.randn(4, 2))),
}


@pytest.mark.parametrize("kind", list(RULES), ids=lambda kind: kind.__name__)
def test_every_rule_of_the_library_passes(kind: type[nn.Module]) -> None:
    module, inputs = MODULES[kind]()
    check_rule(module, *inputs)


def wrong_factor(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> Any:
    return {name: Outer(p.a, 2 * p.g) for name, p in linear(module, inputs, g).items()}


def forgets_the_bias(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> Any:
    return {"weight": linear(module, inputs, g)["weight"]}


def wrong_shape(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> Any:
    return {"weight": g.sum(0), "bias": g}


@pytest.mark.parametrize(
    ("rule", "message"),
    [(wrong_factor, "'weight' is off by"), (forgets_the_bias, "nothing for the parameters"), (wrong_shape, "shape")],
)
def test_a_wrong_rule_is_seen(rule: Any, message: str) -> None:
    with pytest.raises((RuleError, RuntimeError), match=message):
        check_rule(nn.Linear(3, 2), torch.randn(4, 3), rule=rule)


def test_a_layer_that_is_not_linear_in_its_parameters_is_seen() -> None:
    class Squared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight**2)

    def rule(module: Any, inputs: tuple[Tensor, ...], g: Tensor) -> Any:
        return {"weight": 2 * module.weight * g.unsqueeze(2) * inputs[0].unsqueeze(1)}

    with pytest.raises(RuleError, match="not linear in its parameters"):
        check_rule(Squared(3, 2, bias=False), torch.randn(4, 3), rule=rule)


def test_no_rule_and_too_few_samples() -> None:
    with pytest.raises(RuleError, match="no rule is entered for LSTM"):
        check_rule(nn.LSTM(2, 2), torch.randn(3, 2, 2))
    with pytest.raises(RuleError, match="two samples"):
        check_rule(nn.Linear(2, 2), torch.randn(1, 2))


@pytest.mark.parametrize("arguments", [(3, torch.ones(2, 2)), (nn.Linear(2, 2), 3)])
def test_what_is_no_module_or_no_tensor(arguments: Any) -> None:
    with pytest.raises(InvalidTypeError, match="must be"):
        check_rule(*arguments)
    with pytest.raises(InvalidArgumentError, match="tolerance must be"):
        check_rule(nn.Linear(2, 2), torch.randn(2, 2), tolerance=-1.0)
