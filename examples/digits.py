"""What the examples share: scikit-learn's 1,797 real hand-written digits and a small convolutional network."""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers for 8×8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pool(F.gelu(self.conv1(images)))
        hidden = self.pool(F.gelu(self.conv2(hidden)))
        return self.fc2(F.gelu(self.fc1(hidden.flatten(1))))


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """The digits, shuffled, 80 % of them for training."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    cut = int(0.8 * len(images))
    train, test = order[:cut], order[cut:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right answers."""
    images, labels = data.tensors
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: TensorDataset, epochs: int) -> None:
    """Ordinary training."""
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def parser(document: str | None, epochs: int, name: str) -> argparse.ArgumentParser:
    """The options of every example: how long to train, and where to log."""
    made = argparse.ArgumentParser(description=(document or "").splitlines()[0])
    made.add_argument("--epochs", type=int, default=epochs)
    made.add_argument("--logdir", type=Path, default=Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S"))
    return made
