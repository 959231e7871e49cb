"""Prune a trained network by Hessian saliency ½ |H| w² against magnitude |w|, and draw accuracy over sparsity.

The saliency of optimal brain damage (LeCun, Denker, Solla 1990) needs the diagonal of the Hessian: here it is exact.
It speaks of small changes. Measured once, it misleads where most weights go; measured again after each level, on what
is left of the network, it holds.
Run ``python examples/pruning.py``.
"""

import copy

import torch
from digits import DigitsNet, accuracy, load_data, parser, train
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from secorder import per_layer_hessian_diagonal

SPARSITIES = [0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9]


def pruned(model: nn.Module, scores: dict[str, Tensor], share: float) -> nn.Module:
    """A copy with the lowest-scored share of all weights set to zero."""
    model = copy.deepcopy(model)
    ranked = torch.cat([score.flatten() for score in scores.values()]).sort().values
    limit = ranked[int(share * len(ranked))]
    with torch.no_grad():
        for name, score in scores.items():
            model.get_parameter(name).mul_(score >= limit)
    return model


def main() -> None:
    """Train, score, prune, compare."""
    arguments = parser(__doc__, epochs=25, name="pruning").parse_args()
    torch.manual_seed(0)
    data, test = load_data()
    model = DigitsNet()
    train(model, torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4), data, arguments.epochs)
    images, labels = (tensor[:512] for tensor in data.tensors)
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]

    def magnitude(net: nn.Module) -> dict[str, Tensor]:
        return {name: net.get_parameter(name).detach().abs() for name in names}

    def saliency(net: nn.Module) -> dict[str, Tensor]:
        hessian = per_layer_hessian_diagonal(net, nn.CrossEntropyLoss(), images, labels, method="exact").by_parameter()
        return {name: 0.5 * hessian[name].abs() * net.get_parameter(name).detach() ** 2 for name in names}

    once = saliency(model)
    nets = {"magnitude": model, "½|H|w² once": model, "½|H|w² each level": model}
    area = dict.fromkeys(nets, 0.0)
    table = Table(title=f"Test accuracy by share of weights removed, before {accuracy(model, test):.1%}")
    for column in ("removed", *nets):
        table.add_column(column, justify="right")
    with SummaryWriter(str(arguments.logdir)) as writer:
        writer.add_custom_scalars({"pruning": {"accuracy over per cent removed": ["Multiline", ["accuracy/.*"]]}})
        for share in SPARSITIES:
            again = once if share == SPARSITIES[0] else saliency(nets["½|H|w² each level"])
            scores = [magnitude(model), once, again]
            for name, score in zip(nets, scores, strict=True):
                nets[name] = pruned(nets[name], score, share)
            found = {name: accuracy(net, test) for name, net in nets.items()}
            table.add_row(f"{share:.0%}", *(f"{right:.1%}" for right in found.values()))
            for name, right in found.items():
                writer.add_scalar(f"accuracy/{name}", right, round(100 * share))
                area[name] += right / len(SPARSITIES)
    console = Console()
    console.print(table)
    console.print("Mean accuracy over all levels: " + ", ".join(f"{name} {mean:.1%}" for name, mean in area.items()))
    console.print(f"TensorBoard log: {arguments.logdir} (Custom Scalars)")


if __name__ == "__main__":
    main()
