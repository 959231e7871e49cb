"""Hooks of the library's own: silenced together, left out of copies."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder._torch.own_hooks import FirstHooks, OwnHook, added_hooks_removed, outputs_seen, suspended


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


def test_hooks_that_are_added_inside_are_removed_but_those_of_the_library_and_those_from_before() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None, with_kwargs=True)
    with added_hooks_removed([module]):
        module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
        module.register_full_backward_hook(lambda *_: None)
        own = module.register_forward_hook(Counting(Owner()), with_kwargs=True, always_call=True)
    assert len(module._forward_hooks) == len(module._forward_hooks_with_kwargs) == 2
    assert not module._forward_pre_hooks
    assert not module._forward_pre_hooks_with_kwargs
    assert not module._backward_hooks
    own.remove()
    assert len(module._forward_hooks) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_hooks_that_do_nothing(copied: Any) -> None:
    model, hooks = hooked()
    other = copied(model)
    assert torch.equal(call(other), call(model))
    assert [hook.calls for hook in hooks] == [1, 1, 1]
    with suspended(other):
        assert {hook.owner.suspensions for hook in hooks} == {0}


def test_first_hooks_come_before_all_others_and_leave_nothing() -> None:
    calls: list[tuple[str, Any]] = []

    class Noting(OwnHook):
        def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((self.owner, kwargs))

    layer = nn.Identity()
    before = vars(layer).copy()
    layer.register_forward_hook(lambda *_: calls.append(("user", None)))
    handles = [FirstHooks(), FirstHooks()]
    for name, handle in zip(("a", "b"), handles, strict=True):
        handle.put([(layer, Noting(name))])
    layer(torch.ones(1))
    assert calls == [("b", {}), ("a", {}), ("user", None)]
    handles[0].remove()
    handles[0].remove()
    calls.clear()
    layer(torch.ones(1))
    assert calls == [("b", {}), ("user", None)]
    handles[1].remove()
    assert len(layer._forward_hooks) == 1
    assert not layer._forward_hooks_with_kwargs
    assert vars(layer).keys() == before.keys()
    del layer
    handles[1].remove()


@pytest.mark.parametrize("first", [False, True])
def test_outputs_are_seen_by_name_inside_alone(first: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    seen: list[tuple[str, Tensor]] = []
    with outputs_seen(model.named_children(), lambda *told: seen.append(told), first=first):
        result = call(model)
    call(model)
    assert [name for name, _ in seen] == ["0", "1"]
    assert torch.equal(seen[1][1], seen[0][1] if first else result)
