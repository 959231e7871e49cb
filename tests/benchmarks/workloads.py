"""What is measured on: models, data and losses, from fixed seeds."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model with a batch.

    Attributes:
        name: as printed.
        model: the model.
        inputs: the batch.
        targets: class indices.
        smooth: whether its Hessian is not its GGN.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    smooth: bool

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Mean cross entropy."""
        return F.cross_entropy


def mlp(*widths: int, activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of the given widths with an activation between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(activation: type[nn.Module] = nn.ReLU, size: int = 32, width: int = 32) -> nn.Sequential:
    """Three convolutions on 3×size×size images."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 8) ** 2, 10),
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a residual connection."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


def resnet18(width: int = 64, *, large: bool = False) -> nn.Sequential:
    """The shape of ResNet-18 for 32×32 images, or ``large`` ones of 224×224; batch normalisation in eval mode."""
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False) if large else nn.Conv2d(3, width, 3, 1, 1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()] + [nn.MaxPool2d(3, 2, 1)] * large
    fan_in = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        out = width * 2**stage
        layers += [BasicBlock(fan_in, out, stride), BasicBlock(out, out, 1)]
        fan_in = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, 10)]
    return nn.Sequential(*layers).eval()


class TransformerBlock(nn.Module):
    """A GELU transformer block on 64 tokens, its mean classified."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """An LSTM over 16 steps."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(32, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


def _workload(
    name: str, make: Callable[[], nn.Module], *shape: int, smooth: bool, classes: int = 10
) -> Callable[[], Workload]:
    def build() -> Workload:
        torch.manual_seed(0)
        model = make()
        return Workload(name, model, torch.randn(*shape), torch.randint(classes, (shape[0],)), smooth)

    return build


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp-relu": _workload(
        "ReLU MLP 784-512-512-10, N=128", lambda: mlp(784, 512, 512, 10, activation=nn.ReLU), 128, 784, smooth=False
    ),
    "mlp-tanh": _workload(
        "tanh MLP 784-512-512-10, N=128", lambda: mlp(784, 512, 512, 10, activation=nn.Tanh), 128, 784, smooth=True
    ),
    "mlp-small": _workload(
        "tanh MLP 784-256-256-10, N=128", lambda: mlp(784, 256, 256, 10, activation=nn.Tanh), 128, 784, smooth=True
    ),
    "mlp-deep": _workload(
        "sigmoid MLP 64-100×4-5, N=128",
        lambda: mlp(64, *[100] * 4, 5, activation=nn.Sigmoid),
        128,
        64,
        smooth=True,
        classes=5,
    ),
    "mlp-narrow": _workload(
        "tanh MLP 2-64×8-3, N=128",
        lambda: mlp(2, *[64] * 8, 3, activation=nn.Tanh),
        128,
        2,
        smooth=True,
        classes=3,
    ),
    "mlp-wide": _workload(
        "ReLU MLP 784-2048×3-10, N=128",
        lambda: mlp(784, 2048, 2048, 2048, 10, activation=nn.ReLU),
        128,
        784,
        smooth=False,
    ),
    "cnn": _workload("3-convolution ReLU CNN 3×32×32, N=64", cnn, 64, 3, 32, 32, smooth=False),
    "cnn-tanh": _workload(
        "3-convolution tanh CNN 3×16×16, N=8", lambda: cnn(nn.Tanh, 16, 8), 8, 3, 16, 16, smooth=True
    ),
    "resnet18": _workload("ResNet-18 shaped, BN eval, 3×32×32, N=32", resnet18, 32, 3, 32, 32, smooth=False),
    "transformer": _workload("GELU block, width 256, 64 tokens, N=8", TransformerBlock, 8, 64, 256, smooth=True),
    "transformer-small": _workload(
        "GELU block, width 64, 16 tokens, N=8", lambda: TransformerBlock(64), 8, 16, 64, smooth=True
    ),
    "lstm": _workload("LSTM 32-64, 16 steps, N=32", Recurrent, 32, 16, 32, smooth=True),
}
