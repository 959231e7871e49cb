"""Layer-wise learning rates from the Fisher trace, against a single rate, both tuned over the same grid.

A layer with a large Fisher bounds the step of plain gradient descent for all of them. Here each layer gets the rate
``η / sqrt(mean Fisher of the layer)``, normalised to a mean of η, from the online Fisher of a few warm-up steps.
Run ``python examples/layerwise_learning_rates.py``.
"""

import copy

import torch
import torch.nn.functional as F
from digits import DigitsNet, load_data, parser, train
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset
from torch.utils.tensorboard import SummaryWriter

from secorder import CurvatureProbe
from secorder.monitor.statistics import layer_statistics

GRID = [0.01, 0.03, 0.1, 0.3, 1.0]


def loss_on(model: nn.Module, data: TensorDataset) -> float:
    """Mean loss."""
    images, labels = data.tensors
    with torch.no_grad():
        return F.cross_entropy(model(images), labels).item()


def factors_from_fisher(model: nn.Module, data: TensorDataset) -> dict[str, float]:
    """For each layer ``1 / sqrt(mean Fisher)``, with mean one over layers; measured on a copy that trains one epoch."""
    model = copy.deepcopy(model)
    with CurvatureProbe(model, reduction="mean") as probe:
        train(model, torch.optim.SGD(model.parameters(), lr=0.03), data, epochs=1)
        means = {name: row["mean"] for name, row in layer_statistics(probe.fisher_diagonal()).items()}
    factors = {name: mean**-0.5 for name, mean in means.items()}
    return {name: factor * len(factors) / sum(factors.values()) for name, factor in factors.items()}


def main() -> None:
    """Tune both over the grid, compare their best losses on held-out digits."""
    options = parser(__doc__, epochs=5, name="rates")
    options.add_argument("--seeds", type=int, default=3)
    arguments = options.parse_args()
    console = Console()
    results: dict[str, dict[float, list[float]]] = {"single": {}, "by layer": {}}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        data, test = load_data()
        start = DigitsNet()
        factors = factors_from_fisher(start, data)
        for rate in GRID:
            for name in results:
                model = copy.deepcopy(start)
                groups = [
                    {"params": layer.parameters(), "lr": rate * (factors[path] if name == "by layer" else 1.0)}
                    for path, layer in model.named_children()
                    if path in factors
                ]
                torch.manual_seed(seed)
                train(model, torch.optim.SGD(groups, momentum=0.9), data, arguments.epochs)
                results[name].setdefault(rate, []).append(loss_on(model, test))
    table = Table(title="Held-out loss by learning rate")
    for column in ("rate", *results):
        table.add_column(column, justify="right")
    layout = {"learning rates": {"held-out loss": ["Multiline", ["loss/.*"]]}}
    with SummaryWriter(str(arguments.logdir)) as writer:
        writer.add_custom_scalars(layout)
        for index, rate in enumerate(GRID):
            means = {name: sum(losses[rate]) / len(losses[rate]) for name, losses in results.items()}
            table.add_row(f"{rate:g}", *(f"{mean:.4f}" for mean in means.values()))
            for name, mean in means.items():
                writer.add_scalar(f"loss/{name}", mean, index)
    console.print(table)
    console.print("Rates of the last run, relative: " + ", ".join(f"{n} ×{f:.2f}" for n, f in factors.items()))
    best = {n: min((sum(v) / len(v), rate) for rate, v in by_rate.items()) for n, by_rate in results.items()}
    for name, (loss, rate) in best.items():
        console.print(f"best {name}: loss {loss:.4f} at rate {rate:g} (mean of {arguments.seeds} runs)")
    console.print(f"TensorBoard log: {arguments.logdir} (Custom Scalars; step k is the k-th rate)")


if __name__ == "__main__":
    main()
