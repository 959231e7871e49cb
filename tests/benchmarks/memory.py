"""``python -m tests.benchmarks.memory``: the peak memory of a training step, bare and with a probe attached.

What PyTorch's profiler counts, tensor by tensor, so that the figures can be repeated to the byte. Parameters and the
optimizer's state, which exist between steps, are added; the Fisher's own accumulators, which are as large as the
parameters, are told apart from what the probe adds on top.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from secorder import CurvatureProbe

from .workloads import WORKLOADS, TransformerBlock, Workload

Step = Callable[[], None]


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes of tensors alive at once, at most, that were made while ``work`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        alive += size
        peak = max(peak, alive)
    return peak


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class Checkpointed(nn.Module):
    """Transformer blocks that are run again in backward instead of keeping what is inside of them."""

    def __init__(self, depth: int = 6, width: int = 256) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(depth))
        for block in self.blocks:
            block.head = nn.Identity()
        self.head = nn.Linear(width, 10)

    def block(self, index: int, x: Tensor) -> Tensor:
        """One block, on all tokens."""
        block: Any = self.blocks[index]
        q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (block.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + block.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + block.down(F.gelu(block.up(block.norm2(x))))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(len(self.blocks)):
            x = checkpoint(self.block, index, x, use_reentrant=False)
        return self.head(x.mean(1))


def checkpointed() -> Workload:
    """Six blocks under activation checkpointing."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 64, 256), torch.randint(10, (8,))
    return Workload("6 GELU blocks, checkpointed, N=8", Checkpointed(), inputs, targets, True)


def measure(work: Workload, make: Callable[..., torch.optim.Optimizer]) -> tuple[int, int, int, int]:
    """Peak of the bare step, of one with a probe of norms alone, of one with a diagonal, and the diagonal's size."""
    model = copy.deepcopy(work.model)
    optimizer = make(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        work.loss_fn(model(work.inputs), work.targets).backward()
        optimizer.step()

    step()
    between = size_of(model.parameters()) + size_of(
        t for state in optimizer.state.values() for t in state.values() if t is not None
    )
    optimizer.zero_grad()  # so that the step begins with what is between
    bare = peak_memory(step) + between
    peaks = []
    for accumulate in ("trace", "diagonal"):
        with CurvatureProbe(model, accumulate=accumulate) as probe:  # its accumulators exist between steps
            for _ in range(4):  # the batches 1, 2 and 4 check more than the others
                step()
            optimizer.zero_grad()
            peaks.append(peak_memory(step) + between)
    own = size_of(probe.fisher_diagonal().values())
    return bare, peaks[0], peaks[1], own


def main() -> None:
    """Print the table."""
    table = Table(title="Peak memory of a training step (MB)", title_justify="left")
    for column in ("workload", "optimizer", "bare", "trace", "ratio", "diagonal", "ratio", "accumulators", "with them"):
        table.add_column(column, justify="left" if column in ("workload", "optimizer") else "right")
    chosen = [WORKLOADS[key] for key in ("mlp-wide", "mlp-relu", "cnn", "resnet18", "transformer", "lstm")]
    for build in (*chosen, checkpointed):
        for make in (torch.optim.Adam, torch.optim.SGD):
            work = build()
            bare, *probed, own = measure(work, make)
            sizes = [f"{bare / 1e6:.1f}"]
            for peak in probed:
                sizes += [f"{peak / 1e6:.1f}", f"{peak / bare:.3f}×"]
            table.add_row(work.name, make.__name__, *sizes, f"{own / 1e6:.1f}", f"{(probed[1] + own) / bare:.3f}×")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
