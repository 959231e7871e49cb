"""Learn digits 0-4, then 5-9, without forgetting: elastic weight consolidation against plain fine-tuning.

The penalty ½ λ Σ F (θ − θ*)² (Kirkpatrick et al. 2017) holds the weights that the first task needs. F is the Fisher
diagonal that the probe gathers during the last epoch of the first task. Run
``python examples/elastic_weight_consolidation.py``.
"""

import copy

import torch
import torch.nn.functional as F
from digits import DigitsNet, load_data, parser
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from secorder import CurvatureProbe


def part(data: TensorDataset, digits: range) -> TensorDataset:
    """The images of some digits."""
    images, labels = data.tensors
    chosen = (labels >= digits.start) & (labels < digits.stop)
    return TensorDataset(images[chosen], labels[chosen])


def logits_of(model: nn.Module, images: Tensor, digits: range) -> Tensor:
    """Each task has its own five outputs."""
    return model(images)[:, digits.start : digits.stop]


def accuracy_on(model: nn.Module, data: TensorDataset, digits: range) -> float:
    """Share of right answers among the task's digits."""
    images, labels = data.tensors
    with torch.no_grad():
        return (logits_of(model, images, digits).argmax(1) + digits.start == labels).float().mean().item()


def learn(
    model: nn.Module,
    data: TensorDataset,
    digits: range,
    epochs: int,
    fisher: dict[str, Tensor] | None = None,
    strength: float = 0.0,
) -> None:
    """Train on one task, held back by the Fisher of an earlier one."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits_of(model, images, digits), labels - digits.start)
            for name, p in model.named_parameters():
                if fisher is not None:
                    loss = loss + 0.5 * strength * (fisher[name] * (p - start[name]) ** 2).sum()
            loss.backward()
            optimizer.step()


def main() -> None:
    """Both tasks, with and without the penalty."""
    arguments = parser(__doc__, epochs=12, name="ewc").parse_args()
    torch.manual_seed(0)
    data, test = load_data()
    first, second = range(5), range(5, 10)
    model = DigitsNet()
    learn(model, part(data, first), first, arguments.epochs)
    with CurvatureProbe(model, reduction="mean") as probe:
        learn(model, part(data, first), first, 1)  # the Fisher of the first task gathers while it trains
        fisher = probe.fisher_diagonal().by_parameter()
    before = accuracy_on(model, part(test, first), first)

    table = Table(title="Test accuracy after learning digits 5-9")
    for column in ("λ", "digits 0-4", "digits 5-9", "mean"):
        table.add_column(column, justify="right")
    with SummaryWriter(str(arguments.logdir)) as writer:
        writer.add_custom_scalars({"forgetting": {"accuracy over log10 λ": ["Multiline", ["accuracy/.*"]]}})
        for power in (None, 2, 3, 4, 5):
            strength = 0.0 if power is None else 10.0**power
            after = copy.deepcopy(model)
            torch.manual_seed(1)
            learn(after, part(data, second), second, arguments.epochs, fisher, strength)
            old = accuracy_on(after, part(test, first), first)
            new = accuracy_on(after, part(test, second), second)
            name = "0 (plain)" if power is None else f"10^{power}"
            table.add_row(name, f"{old:.1%}", f"{new:.1%}", f"{(old + new) / 2:.1%}")
            for digits, right in (("0-4", old), ("5-9", new), ("mean", (old + new) / 2)):
                writer.add_scalar(f"accuracy/{digits}", right, power or 0)
    console = Console()
    console.print(f"Before, digits 0-4: {before:.1%}")
    console.print(table)
    console.print(f"TensorBoard log: {arguments.logdir} (Custom Scalars)")


if __name__ == "__main__":
    main()
