"""Parameters that a forward overwrites: each pass starts from the same values, and leaves the user's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secorder.layers.selection import select_layers
from secorder.oneshot.isolation import isolate
from secorder.oneshot.parameter_values import may_be_overwritten

from ..helpers import data, make


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(0.5)


def through_data(weight: nn.Parameter) -> None:
    weight.data.clamp_(-0.1, 0.1)


def other_memory(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.5


class Overwriting(nn.Module):
    """Overwrites the weight of a part of it before it runs."""

    def __init__(self, change: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self.net, self.teacher, self.change = make(), nn.Linear(4, 3), change

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.net[2], self.teacher):
            self.change(layer.weight)
        found: Tensor = self.net(x) + self.teacher(x)
        return found


@pytest.mark.parametrize("change", [in_place, through_data, other_memory])
def test_each_run_starts_from_the_same_values(change: Callable[[nn.Parameter], None]) -> None:
    model, (x, _) = Overwriting(change), data()
    held = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with isolate(model, None, select_layers(model, layers="net.*")) as isolated:
        outputs = [isolated.forward(x) for _ in range(3)]
    for name, p in model.named_parameters():
        assert p.data_ptr() == held[name][0]
        assert torch.equal(p, held[name][1])
    outputs.append(model(x))
    assert all(torch.equal(outputs[0], other) for other in outputs)


def test_what_other_processes_write_stays() -> None:
    model = Overwriting(in_place).share_memory()
    assert may_be_overwritten(model, anew=True) == []


def test_torchs_own_modules_overwrite_nothing() -> None:
    model = make()
    assert may_be_overwritten(model, anew=True) == []
    model[0].register_forward_pre_hook(lambda *_: None)
    assert len(may_be_overwritten(model, anew=True)) == 4


def test_a_model_that_overwrites_nothing_is_known_by_its_mode() -> None:
    model, (x, _) = Overwriting(lambda weight: None), data()
    with isolate(model, None, []) as isolated:
        isolated.forward(x)
    assert may_be_overwritten(model, anew=False) == []
    assert len(may_be_overwritten(model, anew=True)) == len(may_be_overwritten(model.eval(), anew=False)) == 6
