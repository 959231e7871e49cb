"""``python -m tests.benchmarks.growth``: how time and memory grow with batch, width, depth, positions and classes.

Each size is doubled twice with the others held, and the exponent fitted beside the one of theory. Small sizes are
cheaper than theory says, since what does not grow has a part in them; what must not be is an exponent above it.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from secorder import CurvatureProbe, per_layer_fisher_diagonal, per_layer_hessian_diagonal

from .memory import peak_memory, size_of
from .timing import alternate, exponent

Sizes = dict[str, int]
Work = Callable[[], object]


class Tokens(nn.Module):
    """Smooth layers of one width on every position, the mean of the positions classified."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x.mean(1))


def built(sizes: Sizes) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, inputs and targets."""
    torch.manual_seed(0)
    model = Tokens(sizes["width"], sizes["depth"], sizes["classes"])
    inputs = torch.randn(sizes["batch"], sizes["positions"], sizes["width"])
    return model, inputs, torch.randint(sizes["classes"], (sizes["batch"],))


def passive_fisher(sizes: Sizes) -> Work:
    """A training step with a probe."""
    model, inputs, targets = built(sizes)
    probe = CurvatureProbe(model)

    def step() -> object:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        return probe

    for _ in range(4):  # whose checks are past
        step()
    return step


def type_2_fisher(sizes: Sizes) -> Work:
    """The exact generalised Gauss-Newton diagonal."""
    model, inputs, targets = built(sizes)
    return lambda: per_layer_fisher_diagonal(model, F.cross_entropy, inputs, targets, fisher_type="type-2")


def exact_hessian(sizes: Sizes) -> Work:
    """The Hessian diagonal by basis vectors of the pre-activations."""
    model, inputs, targets = built(sizes)
    return lambda: per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="exact")


def stochastic_hessian(sizes: Sizes) -> Work:
    """The Hessian diagonal from 16 draws."""
    model, inputs, targets = built(sizes)
    generator = torch.Generator().manual_seed(0)
    return lambda: per_layer_hessian_diagonal(
        model, F.cross_entropy, inputs, targets, method="hutchinson", num_draws=16, generator=generator
    )


AXES = ("batch", "width", "depth", "positions", "classes")

#: The work, the sizes it starts from, and theory's exponents of time and memory in :data:`AXES`. A layer's products
#: run through the layers after it, so that second order is quadratic in depth; a basis has width · positions vectors.
#: The roots of N softmax Hessians hold N · C² numbers.
WORKS: dict[str, tuple[Callable[[Sizes], Work], Sequence[int], Sequence[int], Sequence[int]]] = {
    "online Fisher": (passive_fisher, (64, 256, 4, 32, 32), (1, 2, 1, 1, 1), (1, 2, 1, 1, 1)),
    "type-2 Fisher": (type_2_fisher, (32, 128, 4, 16, 32), (1, 2, 1, 1, 1), (1, 2, 1, 1, 2)),
    "exact Hessian": (exact_hessian, (32, 32, 2, 8, 10), (1, 3, 2, 2, 1), (1, 2, 1, 1, 1)),
    "stochastic Hessian": (stochastic_hessian, (64, 128, 3, 32, 10), (1, 2, 2, 1, 1), (1, 2, 1, 1, 1)),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Growth of time and memory.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=list(WORKS), action="append")
    options = parser.parse_args()
    table = Table(title="Exponents of growth, measured / theory", title_justify="left")
    table.add_column("work")
    table.add_column("of")
    for axis in AXES:
        table.add_column(axis, justify="right")
    for name in options.only or WORKS:
        make, base, *theory = WORKS[name]
        rows: list[list[str]] = [[], []]
        for place, axis in enumerate(AXES):
            grid = [factor * base[place] for factor in (1, 2, 4)]
            sizes = {n: dict(zip(AXES, base, strict=True)) | {axis: n} for n in grid}
            runs = {n: make(sizes[n]) for n in grid}
            times = alternate({str(n): run for n, run in runs.items()}, options.repeats)
            peaks = [peak_memory(runs[n]) + size_of(built(sizes[n])[0].parameters()) for n in grid]
            for row, found, expected in zip(rows, (list(times.values()), peaks), theory, strict=True):
                fitted = exponent(grid, found)
                mark = " !" if fitted > expected[place] + 0.15 else ""
                row.append(f"{fitted:.2f} / {expected[place]}{mark}")
        table.add_row(name, "time", *rows[0])
        table.add_row("", "memory", *rows[1])
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
