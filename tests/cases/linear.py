"""Piecewise linear models, or nearly so."""

from typing import Any

import torch
from torch import Tensor, nn

from ..helpers import Fn
from .case import N, case, classes


def smooth_for_one(x: Tensor) -> Tensor:
    return torch.cat([torch.relu(x[:-1]), torch.tanh(x[-1:])]) if len(x) > 1 else torch.tanh(x)


@case(skip={"fisher": "samples are told apart by place", "online": "the same"})
def one_sample_of_many_smooth() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), Fn(smooth_for_one), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def tanh_in_its_nearly_linear_range() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3) * 1e-4, classes()


@case()
def tanh_then_relu() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def relu_loss_not_convex() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return model, lambda f, t: torch.sin(3 * f).sum(1).mean(), torch.randn(N, 3), classes()


@case()
def l1_loss() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return model, nn.L1Loss(), torch.randn(N, 3), torch.randn(N, 2)


@case()
def maxpool_relu() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 1, 5, 5), classes()
