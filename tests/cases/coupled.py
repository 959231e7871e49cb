"""Samples that are coupled."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CouplingError

from ..helpers import Fn, Net
from .case import COUPLED, STRICT, N, case, classes


@case(ill_conditioned=True, refused=COUPLED, options=STRICT)
def batch_norm_train() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(refused=COUPLED, options={**STRICT, "layers": ["3"]})
def batch_norm_train_layer_after_it_only() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(ill_conditioned=True, refused=COUPLED, options=STRICT)
def batch_norm2d_train_relu() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 1, 3, 3), classes()


@case(refused=COUPLED, options=STRICT)
def batch_mean() -> Any:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x) - m.a(x).mean(0))), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


def mix_two(x: Tensor) -> Tensor:
    """Only the last of the samples sees the first."""
    return torch.cat([x[:-1], x[-1:] + 0.5 * x[:1] ** 2]) if len(x) > 1 else x


@case(refused=COUPLED, options=STRICT)
def two_of_the_samples() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Fn(mix_two), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(refused=COUPLED, options=STRICT)
def two_of_the_inputs() -> Any:
    model = nn.Sequential(Fn(mix_two), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(refused=COUPLED, options=STRICT)
def two_of_the_samples_lstm() -> Any:
    model = Net(
        lambda m, x: m.head(mix_two(m.core(x)[0][:, -1])), core=nn.LSTM(2, 2, batch_first=True), head=nn.Linear(2, 3)
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


NOT_SEEN = {"online": "hooks on the model do not see the loss"}


@case(refused={"fisher": CouplingError}, skip=NOT_SEEN)
def contrastive_loss() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, lambda f, t: F.cross_entropy(f @ f.T, torch.arange(len(f))), torch.randn(N, 3), classes()


@case(refused={"fisher": CouplingError}, skip=NOT_SEEN)
def loss_of_the_mean_output() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    return model, lambda f, t: (f.mean(0) ** 2).sum(), torch.randn(N, 3), classes()


@case(refused={"fisher": CouplingError}, skip=NOT_SEEN)
def loss_inside_of_the_mean_output() -> Any:
    model = Net(lambda m, x: (m.a(x).mean(0) ** 2).sum(), a=nn.Linear(3, 3))
    return model, lambda loss, _: loss, torch.randn(N, 3), None
