"""Modules in the order in which PyTorch tells of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from secorder._torch.walk import modules_in


def test_modules_are_those_of_pytorch_in_its_order() -> None:
    shared = nn.Linear(2, 2)
    inner = nn.Sequential(nn.ReLU(), shared, nn.Sequential(shared, nn.Tanh()))
    model = nn.ModuleDict({"a": inner, "b": shared, "c": nn.LSTM(2, 2), "d": inner})
    inner.register_module("none", None)
    for x in (model, shared, torch.jit.script(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))):
        found = modules_in(x)
        assert len(found) == len(list(x.modules()))
        assert all(one is other for one, other in zip(found, x.modules(), strict=True))


def test_who_tells_of_other_modules_is_asked() -> None:
    class Hiding(nn.Sequential):
        def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
            yield "", self

    for model in (Hiding(nn.ReLU()), nn.Sequential(nn.Tanh(), Hiding(nn.ReLU()))):
        assert modules_in(model) == list(model.modules())
