"""Train a small convolutional network on scikit-learn's digits and watch the curvature of its layers.

Run ``python examples/train_digits.py``; then ``tensorboard --logdir runs`` shows the same numbers over time. While it
trains, ``secorder watch runs`` does so in another terminal.
"""

import torch
from digits import DigitsNet, accuracy, load_data, parser
from PIL import Image
from rich.console import Console
from rich.live import Live
from torch import nn
from torch.utils.data import DataLoader

from secorder import CurvatureProbe, CurvatureRecorder, report
from secorder.monitor.log import picture


def main() -> None:
    """Train, log, show, and say what was found."""
    arguments = parser(__doc__, epochs=12, name="digits").parse_args()
    torch.manual_seed(0)
    console = Console()
    train, test = load_data()
    model, loss_fn = DigitsNet(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch_size = 64
    held = test.tensors[0][:64], test.tensors[1][:64]  # the Hessian is measured on these
    changes: list[str] = []

    with (
        CurvatureProbe(model, reduction=loss_fn) as probe,  # the only line that training needs
        CurvatureRecorder(
            probe,
            [arguments.logdir, arguments.logdir / "run.jsonl"],
            log_every=10,
            hessian_every=50,
            eigenvalues_every=50,
            loss_fn=loss_fn,
            batch=held,
            optimizer=optimizer,
            on_finding=lambda change: changes.append(str(change)),
        ) as recorder,
        Live(console=console, refresh_per_second=4) as live,
    ):
        for epoch in range(1, arguments.epochs + 1):
            for images, labels in DataLoader(train, batch_size=batch_size, shuffle=True):
                optimizer.zero_grad()
                loss = loss_fn(model(images), labels)
                loss.backward()  # the Fisher diagonal accumulates here
                optimizer.step()
                recorder.step(loss=loss)
            hessian = probe.hessian_diagonal(loss_fn, *held, method="exact")
            right = accuracy(model, test)
            live.update(report(probe.fisher_diagonal(), hessian, title=f"epoch {epoch}, test accuracy {right:.1%}"))

    history = recorder.history
    first, last = history.points("fisher_trace")[0][1], history.points("fisher_trace")[-1][1]
    mean = history.points("fisher_mean")[-1][1]
    steepest, calmest = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
    change = ", ".join(f"{name} ×{trace / first[name]:.2g}" for name, trace in last.items())
    console.print(f"\nTest accuracy {right:.1%} after {history.to_dict()['step'][-1]:.0f} steps.")
    ratio = mean[steepest] / mean[calmest]
    console.print(
        f"Per parameter, {steepest} is the most sensitive layer: its mean Fisher is {ratio:.0f} times that of "
        f"{calmest}, so one learning rate for both is a compromise."
    )
    console.print(f"Fisher trace since the first ten steps: {change}.")
    noise = sorted(row["gradient_noise_scale"] for _, row in history.points("model") if "gradient_noise_scale" in row)
    console.print(
        f"Gradient noise scale: {noise[len(noise) // 2]:.0f} samples in the median, where a batch has {batch_size}."
    )
    if edge := history.points("learning_rate_times_eigenvalue"):  # none yet, in a run of fewer than fifty steps
        tops = history.points("hessian_top_eigenvalue")[-1][1]
        eigenvalues = ", ".join(f"{name} {top:.2g}" for name, top in tops.items())
        product = max(edge[-1][1].values())
        console.print(
            f"Top eigenvalues of the layers' Hessians: {eigenvalues}; times the learning rate {product:.2g} at most."
        )
    spent = ", ".join(f"{name} by {info.strategy} ({info.num_hvps} HVPs)" for name, info in hessian.info.items())
    console.print(f"Exact Hessian diagonal: {spent}.")
    for line in changes or ["Nothing stood out."]:
        console.print(f"• {line}", markup=False, highlight=False)
    Image.fromarray(picture(history, "fisher_trace")).save(arguments.logdir / "layers_over_steps.png")
    console.print(f"Picture of all layers over the run: {arguments.logdir}/layers_over_steps.png")
    console.print(f"TensorBoard log: {arguments.logdir}  (tensorboard --logdir {arguments.logdir.parent})")


if __name__ == "__main__":
    main()
