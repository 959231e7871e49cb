"""``python -m tests.benchmarks``: cost of the passive Fisher and of the exact Hessian, side by side with peers.

Every figure is a median over runs in which the contestants alternate, and the ratios are of those medians: absolute
times drift on shared machines. BackPACK takes part where it is installed (``pip install --no-deps
backpack-for-pytorch``, with einops and unfoldNd).
"""

import argparse
import copy
import importlib.util
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from secorder import CurvatureProbe, per_layer_hessian_diagonal

HAS_BACKPACK = importlib.util.find_spec("backpack") is not None


def mlp(*widths: int, activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of the given widths with an activation between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Three convolutions on 3×32×32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


def alternate(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each contestant, all of them run in turn ``repeats`` times after two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(console: Console, title: str, times: dict[str, float], errors: dict[str, float] | None = None) -> None:
    """Print medians and their ratio to the first contestant."""
    table = Table(title=title, title_justify="left")
    for column, justify in (("contestant", "left"), ("median", "right"), ("ratio", "right"), ("rel. error", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    first = next(iter(times.values()))
    for name, seconds in times.items():
        error = f"{errors[name]:.1e}" if errors and name in errors else ""
        table.add_row(name, f"{seconds * 1e3:.1f} ms", f"{seconds / first:.2f}×", error)
    console.print(table)


Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def training_step(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, make_optimizer: Optimizer
) -> Callable[[], None]:
    """A step of ordinary training."""
    optimizer = make_optimizer(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def passive_fisher(
    console: Console, title: str, model: nn.Module, inputs: torch.Tensor, repeats: int, make_optimizer: Optimizer
) -> None:
    """A bare training step against one with a probe attached, and BackPACK's squared per-sample gradients."""
    targets = torch.randint(10, (len(inputs),))
    probed, sparse = copy.deepcopy(model), copy.deepcopy(model)
    contestants = {
        "bare step": training_step(copy.deepcopy(model), inputs, targets, make_optimizer),
        "with a probe": training_step(probed, inputs, targets, make_optimizer),
    }
    probes = [CurvatureProbe(probed), CurvatureProbe(sparse, every=10)]
    tenth = training_step(sparse, inputs, targets, make_optimizer)
    contestants["with a probe, every=10 (10 steps)"] = lambda: [tenth() for _ in range(10)]
    if HAS_BACKPACK:
        from backpack import backpack, extend, extensions

        extended, loss_fn = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
        optimizer = make_optimizer(extended.parameters())

        def step() -> None:
            optimizer.zero_grad()
            with backpack(extensions.SumGradSquared()):
                loss_fn(extended(inputs), targets).backward()
            optimizer.step()

        contestants["BackPACK SumGradSquared"] = step
    times = alternate(contestants, repeats)
    times["with a probe, every=10"] = times.pop("with a probe, every=10 (10 steps)") / 10
    show(console, f"Passive Fisher per training step: {title}", times)
    for probe in probes:
        probe.detach()


def exact_hessian(console: Console, title: str, model: nn.Module, inputs: torch.Tensor, repeats: int) -> None:
    """The exact Hessian diagonal of all layers, against BackPACK's DiagHessian, with the error in float32."""
    targets = torch.randint(10, (len(inputs),))
    double = copy.deepcopy(model).double()
    exact = per_layer_hessian_diagonal(double, nn.functional.cross_entropy, inputs.double(), targets)
    reference = torch.cat(list(exact.values()))

    def error(found: torch.Tensor) -> float:
        return ((found.double() - reference).norm() / reference.norm()).item()

    def ours() -> torch.Tensor:
        return torch.cat(list(per_layer_hessian_diagonal(model, nn.functional.cross_entropy, inputs, targets).values()))

    contestants: dict[str, Callable[[], object]] = {"secorder": ours}
    errors = {"secorder": error(ours())}
    if HAS_BACKPACK:
        from backpack import backpack, extend, extensions

        extended, loss_fn = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())

        def theirs() -> torch.Tensor:
            with backpack(extensions.DiagHessian()):
                loss_fn(extended(inputs), targets).backward()
            return torch.cat([p.diag_h.flatten() for p in extended.parameters()])

        contestants["BackPACK DiagHessian"] = theirs
        errors["BackPACK DiagHessian"] = error(theirs())
    show(console, f"Exact Hessian diagonal: {title}", alternate(contestants, repeats), errors)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Cost of curvature, as ratios in one run.")
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.manual_seed(0)
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {repeats} runs")
    images = torch.randn(128, 784)
    optimizers: dict[str, Optimizer] = {
        "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-5),
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-5),
    }
    for name, make in optimizers.items():
        network = mlp(784, 512, 512, 10, activation=nn.ReLU)
        passive_fisher(console, f"ReLU MLP 784-512-512-10, N=128, {name}", network, images, 4 * repeats, make)
    for name, make in optimizers.items():
        batch = torch.randn(64, 3, 32, 32)
        passive_fisher(console, f"three-convolution CNN, 3×32×32, N=64, {name}", cnn(), batch, repeats, make)
    for activation in (nn.Tanh, nn.ReLU):
        exact_hessian(
            console,
            f"{activation.__name__} MLP 784-256-256-10, N=128",
            mlp(784, 256, 256, 10, activation=activation),
            images,
            repeats,
        )


if __name__ == "__main__":
    main()
