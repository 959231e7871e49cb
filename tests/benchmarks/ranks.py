"""``torchrun --nproc-per-node 2 -m tests.benchmarks.ranks``: a probe's overhead under DistributedDataParallel.

The median of a training step, bare and with a probe, and of one ``synchronize()``, as the first rank sees them.
"""

import copy

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from secorder import CurvatureProbe

from .__main__ import OPTIMIZERS, training_step
from .timing import alternate
from .workloads import WORKLOADS


def main() -> None:
    """Print the table."""
    dist.init_process_group("gloo")
    table = Table(title=f"{dist.get_world_size()} processes, one thread each", title_justify="left")
    for column in ("workload", "bare step", "with probe", "ratio", "synchronize()", "bytes"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for key in ("mlp-relu", "cnn"):
        work = WORKLOADS[key]()
        models = {name: copy.deepcopy(work.model) for name in ("bare", "probe")}
        probe = CurvatureProbe(models["probe"])
        steps = {
            name: training_step(work, DistributedDataParallel(model), OPTIMIZERS["Adam"])
            for name, model in models.items()
        }
        times = alternate({**steps, "synchronize": probe.synchronize}, 31, warm_up=5)
        size = sum(d.numel() * d.element_size() for d in probe.fisher_diagonal().values())
        shown = [f"{times[name] * 1e3:.1f} ms" for name in ("bare", "probe", "synchronize")]
        ratio = f"{times['probe'] / times['bare']:.2f}×"
        table.add_row(work.name, shown[0], shown[1], ratio, shown[2], f"{size / 1e6:.1f} MB")
    if dist.get_rank() == 0:
        Console(width=110).print(table)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
