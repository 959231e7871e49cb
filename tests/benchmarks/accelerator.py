"""``python -m tests.benchmarks.accelerator``: what a probe costs a training step on an accelerator.

A wide MLP and ResNet-18 in float32, a decoder of GPT-2 small's shape under bfloat16 autocast; each bare, with traces,
with the diagonal, and with the diagonal at each tenth step; as it is and compiled. ``--small`` shrinks the models, to
try the command itself on a CPU.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from secorder import CurvatureProbe

from .__main__ import machine_of
from .large import Decoder
from .timing import Results, alternate
from .workloads import mlp, resnet18

PROBES: dict[str, dict[str, Any] | None] = {
    "bare step": None,
    "trace": {"accumulate": "trace"},
    "diagonal": {},
    "diagonal, every=10": {"every": 10},
}
#: The steps that are timed together, so that one of them is recorded with ``every=10``.
STEPS = 10

Made = tuple[nn.Module, Tensor, Tensor]


def multilayer(small: bool) -> Made:
    """Linear layers of width 4,096, 512 samples."""
    width, count = (64, 16) if small else (4096, 512)
    model = mlp(width, width, width, width, 10, activation=nn.ReLU)
    return model, torch.randn(count, width), torch.randint(10, (count,))


def residual(small: bool) -> Made:
    """ResNet-18's layers on images of 224 × 224."""
    width, size, count = (8, 64, 4) if small else (64, 224, 64)
    return resnet18(width, large=True), torch.randn(count, 3, size, size), torch.randint(10, (count,))


def decoder(small: bool) -> Made:
    """GPT-2 small's shape, 8 texts of 512 tokens."""
    words, tokens, count = (100, 16, 2) if small else (50257, 512, 8)
    model = Decoder(words, width=64, depth=2, heads=4) if small else Decoder()
    text = torch.randint(words, (count, tokens + 1))
    return model, text[:, :-1], text[:, 1:]


def training(model: nn.Module, inputs: Tensor, targets: Tensor, low: bool) -> Callable[[], None]:
    """Some steps of training with SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    kind = inputs.device.type
    precision: AbstractContextManager[Any] = torch.autocast(kind, torch.bfloat16) if low else nullcontext()

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            with precision:
                loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            optimizer.step()

    return steps


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_default_device(options.device)
    results = Results(Console(width=120))
    results.console.print(f"torch {torch.__version__}, {machine_of(options.device)}")
    made = {
        "MLP, float32": (multilayer, False),
        "ResNet-18, float32": (residual, False),
        "GPT-2 small's shape, bfloat16 autocast": (decoder, True),
    }
    for name, (make, low) in made.items():
        for compiled in (False, True):
            torch.manual_seed(0)
            model, inputs, targets = make(options.small)
            contestants: dict[str, Callable[[], object]] = {}
            probes = []
            for label, settings in PROBES.items():
                own = copy.deepcopy(model)
                run = torch.compile(own) if compiled else own
                if settings is not None:
                    probes.append(CurvatureProbe(run, reduction="mean", **settings))
                contestants[label] = training(run, inputs, targets, low)
            times = {label: seconds / STEPS for label, seconds in alternate(contestants, options.repeats).items()}
            results.show("A training step" + (", compiled" if compiled else ""), name, times)
            for probe in probes:
                probe.detach()


if __name__ == "__main__":
    main()
