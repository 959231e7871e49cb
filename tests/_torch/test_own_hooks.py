"""Hooks of the library on a model's modules."""

import copy
import pickle
from typing import Any

import torch
from torch import nn

from secorder._torch.own_hooks import OwnHook, suspended


class Owner:
    def __init__(self) -> None:
        self.suspensions = 0


class Counting(OwnHook):
    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.calls = 0

    def run(self, *_: Any) -> None:
        self.calls += not self.owner.suspensions


def test_hooks_run_are_silenced_together_and_left_out_of_copies() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    hooks = [Counting(Owner()), Counting(Owner())]
    for hook in hooks:
        model[0].register_forward_hook(hook)
    model(x)
    with suspended(model):
        model(x)
    assert [hook.calls for hook in hooks] == [1, 1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    assert [hook.calls for hook in hooks] == [3, 3]
    assert [hook.owner.suspensions for hook in hooks] == [0, 0]
