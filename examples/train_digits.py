"""Train a small convolutional network on scikit-learn's digits and watch the curvature of its layers.

Run ``python examples/train_digits.py``; then ``tensorboard --logdir runs`` shows the same numbers over time.
"""

import torch
from digits import DigitsNet, accuracy, load_data, parser
from rich.console import Console
from rich.live import Live
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from secorder import CurvatureProbe, report
from secorder.monitor.statistics import layer_statistics


def main() -> None:
    """Train, log, show, and say what was found."""
    arguments = parser(__doc__, epochs=12, name="digits").parse_args()
    torch.manual_seed(0)
    console = Console()
    train, test = load_data()
    model, loss_fn = DigitsNet(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    held_images, held_labels = (tensor[:64] for tensor in test.tensors)  # the Hessian is measured on these

    step = 0
    with (
        CurvatureProbe(model, decay=0.9) as probe,  # the only line that training needs
        SummaryWriter(str(arguments.logdir)) as writer,
        Live(console=console, refresh_per_second=4) as live,
    ):
        first = None
        for epoch in range(1, arguments.epochs + 1):
            for images, labels in DataLoader(train, batch_size=64, shuffle=True):
                optimizer.zero_grad()
                loss = loss_fn(model(images), labels)
                loss.backward()  # the Fisher diagonal accumulates here
                optimizer.step()
                step += 1
                if step % 10 == 0:
                    probe.log(writer, step)
                    writer.add_scalar("loss/train", loss.item(), step)
            fisher = probe.fisher_diagonal()
            hessian = probe.hessian_diagonal(loss_fn, held_images, held_labels)
            probe.log(writer, step, hessian=hessian)
            right = accuracy(model, test)
            writer.add_scalar("accuracy/test", right, step)
            live.update(report(fisher, hessian, title=f"epoch {epoch}, test accuracy {right:.1%}"))
            first = first or layer_statistics(fisher)

    last = layer_statistics(fisher)
    steepest = max(last, key=lambda name: last[name]["mean"])
    calmest = min(last, key=lambda name: last[name]["mean"])
    change = ", ".join(f"{name} ×{row['trace'] / first[name]['trace']:.2g}" for name, row in last.items())
    negative = layer_statistics(hessian)
    console.print(f"\nTest accuracy {right:.1%} after {step} steps.")
    console.print(
        f"Per parameter, {steepest} is the most sensitive layer: its mean Fisher is "
        f"{last[steepest]['mean'] / last[calmest]['mean']:.0f} times that of {calmest}, so one learning rate for both "
        "is a compromise."
    )
    console.print(f"Fisher trace since the first epoch: {change}.")
    share = ", ".join(f"{name} {row['negative']:.0%}" for name, row in negative.items())
    console.print(f"Share of negative entries in the Hessian diagonal on 64 held-out digits: {share}.")
    spent = ", ".join(f"{name} by {info.strategy} ({info.num_hvps} HVPs)" for name, info in hessian.info.items())
    console.print(f"Exact Hessian: {spent}.")
    console.print(f"TensorBoard log: {arguments.logdir}  (tensorboard --logdir {arguments.logdir.parent})")


if __name__ == "__main__":
    main()
