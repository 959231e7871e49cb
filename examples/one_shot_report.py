"""Diagnose a trained network on its whole training set: a table of layers, and what stands out in words.

Run ``python examples/one_shot_report.py``.
"""

import torch
from digits import DigitsNet, accuracy, load_data, parser, train
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import secorder
from secorder.monitor.heat_map import heat_map
from secorder.monitor.log import log_diagonals


def main() -> None:
    """Train a good and a badly started network, and let the diagnosis show the difference."""
    arguments = parser(__doc__, epochs=8, name="report").parse_args()
    torch.manual_seed(0)
    console = Console()
    data, test = load_data()
    means: dict[str, list[float]] = {}
    for name in ("healthy", "dead units"):
        model = DigitsNet()
        if name == "dead units":
            with torch.no_grad():
                model.fc1.bias[:40] = -20.0  # a bad start: these units never fire
        train(model, torch.optim.Adam(model.parameters(), lr=3e-3), data, arguments.epochs)
        diagnosis = secorder.diagnose(
            model, nn.CrossEntropyLoss(), DataLoader(data, batch_size=512), progress=console.is_terminal
        )
        console.print(f"\n[bold]{name}[/bold], test accuracy {accuracy(model, test):.1%}")
        console.print(diagnosis)
        assert diagnosis.fisher is not None
        with SummaryWriter(str(arguments.logdir / name.replace(" ", "-"))) as writer:
            log_diagonals(writer, diagnosis.fisher, 0, "fisher")
            log_diagonals(writer, diagnosis.hessian, 0, "hessian")
            for layer, row in diagnosis.statistics["fisher"].items():
                means.setdefault(layer, []).append(row["mean"])
            if name == "dead units":
                picture = heat_map(list(means.values()), list(means), [0, 1], "mean Fisher: healthy, dead units")
                writer.add_image("healthy against dead units", picture, dataformats="HWC")
    console.print(f"\nTensorBoard log: {arguments.logdir}")


if __name__ == "__main__":
    main()
