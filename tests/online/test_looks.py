"""When a batch is looked at."""

import torch
from torch import nn

from secorder import CurvatureProbe

from ..helpers import Net, data, mlp, step


def test_batches_are_looked_at_at_powers_of_two() -> None:
    model = Net(lambda m, x: m.fc(x), fc=nn.Linear(4, 3))
    with CurvatureProbe(model) as probe:
        looked = []
        for index in range(1, 17):
            before = probe._looks.known()
            step(model, data())
            if probe._looks.known() is not before:
                looked.append(index)
    assert looked == [1, 2, 4, 8, 16]


def test_modes_are_told_apart_and_what_is_known_is_forgotten() -> None:
    model = mlp()
    with CurvatureProbe(model) as probe:
        step(model, data())
        assert probe._looks.known() is not None
        model.eval()
        assert probe._looks.known() is None
        assert probe._looks.any_known() is not None
        probe._looks.forget()
        assert probe._looks.any_known() is None


def test_a_look_runs_no_backward_hook_of_the_users() -> None:
    model, calls = Net(lambda m, x: m.fc(x), fc=nn.Linear(4, 3)), []
    model.fc.register_full_backward_hook(lambda *_: calls.append(1))
    with CurvatureProbe(model):
        step(model, data())
    assert calls == [1]
    assert torch.is_grad_enabled()
