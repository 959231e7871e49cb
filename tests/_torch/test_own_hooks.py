"""Hooks of the library's own: silenced together, left out of copies."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder._torch.own_hooks import OwnHook, suspended


class Owner:
    suspensions = 0


class Counting(OwnHook):
    calls = 0

    def __call__(self, *_: Any) -> None:
        if not self.owner.suspensions:
            self.calls += 1


def hooked() -> tuple[nn.Module, list[Counting]]:
    model, owner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Owner()
    hooks = [Counting(owner), Counting(owner), Counting(Owner())]
    model[0].register_forward_pre_hook(hooks[0])
    model[1].register_forward_hook(hooks[1])
    model.register_forward_hook(hooks[2])
    return model, hooks


def call(model: nn.Module) -> Tensor:
    return model(torch.ones(1, 2))


def test_every_owner_is_suspended_once_and_only_inside() -> None:
    model, hooks = hooked()
    with suspended(model):
        call(model)
        assert {hook.owner.suspensions for hook in hooks} == {1}
        with suspended(model):
            assert {hook.owner.suspensions for hook in hooks} == {2}
    assert {hook.owner.suspensions for hook in hooks} == {0}
    assert [hook.calls for hook in hooks] == [0, 0, 0]
    with pytest.raises(KeyError), suspended(model):
        raise KeyError
    call(model)
    assert [hook.calls for hook in hooks] == [1, 1, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_hooks_that_do_nothing(copied: Any) -> None:
    model, hooks = hooked()
    other = copied(model)
    assert torch.equal(call(other), call(model))
    assert [hook.calls for hook in hooks] == [1, 1, 1]
    with suspended(other):
        assert {hook.owner.suspensions for hook in hooks} == {0}
