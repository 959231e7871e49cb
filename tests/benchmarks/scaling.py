"""``python -m tests.benchmarks.scaling``: what a probe keeps and sends on each of 64 to 1,024 ranks.

Llama shapes of 8 and 70 billion parameters under ``fully_shard`` and tensor parallelism. The layers are made on the
meta device and spread over ranks by PyTorch's fake process group, which has any number of ranks in one process and
sends nothing: so accumulators are those that a rank would have, without their memory. What is sent follows from them;
:mod:`tests.test_scaling` counts both in real processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from secorder import CurvatureProbe
from secorder.layers.selection import Layer

#: Sequences a data rank.
SEQUENCES = 8
#: Numbers of float64 or int64, and in each layer's row of the table of norms.
EIGHT, ROW = 8, 10


class Llama(NamedTuple):
    """A shape."""

    name: str
    vocabulary: int
    width: int
    inner: int
    key_width: int
    depth: int


LLAMAS = (
    Llama("Llama 8B", 128256, 4096, 14336, 1024, 32),
    Llama("Llama 70B", 128256, 8192, 28672, 1024, 80),
)
#: Data ranks and tensor ranks.
MESHES = ((8, 8), (32, 8), (128, 8))

PLAN: dict[str, Any] = {
    **{name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")},
    **{name: RowwiseParallel() for name in ("out", "down")},
}


class Block(nn.Module):
    """The layers of one block; grouped keys are repeated."""

    def __init__(self, shape: Llama) -> None:
        super().__init__()
        width, inner, keys = shape.width, shape.inner, shape.key_width
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, keys, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """A position gets a sum of those before it in place of attention: the layers are what counts here."""
        h = self.before(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        mixed = (k * v).cumsum(1)
        x = x + self.out(torch.tanh(q) * mixed.repeat(1, 1, q.shape[-1] // mixed.shape[-1]))
        h = self.after(x)
        return x + self.down(torch.tanh(self.gate(h)) * self.up(h))


class Net(nn.Module):
    """Table, blocks and head."""

    def __init__(self, shape: Llama) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found


def spread(model: Net, mesh: Any) -> Net:
    """Spread a model over a mesh of ``"data"`` and ``"tensor"``; a dimension of one rank is left out."""
    if mesh["tensor"].size() > 1:
        plan = {
            "table": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, mesh["tensor"], plan)
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], PLAN)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh["data"])
    return model


class Cost(NamedTuple):
    """Of one rank.

    Attributes:
        kept: bytes of what is accumulated.
        scattered: bytes that reduce-scatters of a recorded step are given.
        reduced: bytes that all-reduces of a recorded step are given.
    """

    kept: int
    scattered: int
    reduced: int


def cost(probe: CurvatureProbe, samples: int) -> Cost:
    """What a probe keeps, and what each of its recorded steps gives to collectives.

    A step that takes no look, and of a diagonal no norms.

    Args:
        probe: on a model that is spread over ranks.
        samples: of the rank.
    """
    fisher, layers = probe._fisher, probe._fisher.layers
    assert fisher.ranks is not None
    axes = len(fisher.ranks.data) + len(fisher.ranks.tensor)
    kept = sum(t.nbytes for sums in fisher.sums.values() for t in (*sums.sums, sums.counts)) + len(layers) * ROW * EIGHT
    # A record is opened and settled, and in the end troubles are shared.
    reduced = axes * EIGHT * (3 + 3 + 2 + len(layers) + 2 * len(layers))
    if probe.accumulate == "diagonal":
        scattered = sum(_formed(layer) for layer in layers)
        return Cost(kept, scattered, reduced + axes * EIGHT * 4 * len(layers))
    split = sum(layer.split for layer in layers)
    norms = axes * len(layers) + len(fisher.ranks.tensor) * split * (samples + 1)
    return Cost(kept, 0, reduced + EIGHT * (norms + len(fisher.ranks.data) * len(layers) * (ROW + 1)))


def _formed(layer: Layer) -> int:
    """Bytes of a layer's squares of this rank's samples."""
    each = max(4, next(iter(layer.parameters.values())).element_size())
    return each * sum(layer.sizes())


@contextmanager
def faked(data: int, tensor: int) -> Iterator[Any]:
    """A mesh of so many ranks, of which this process is the first, and no other is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=data * tensor)
    try:
        yield init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    finally:
        dist.destroy_process_group()


def costs(shape: Llama, data: int, tensor: int) -> dict[str, Cost]:
    """By what is accumulated."""
    with faked(data, tensor) as mesh:
        with torch.device("meta"):
            model = Net(shape).float()
        spread(model, mesh)
        found = {}
        for accumulate in ("diagonal", "trace"):
            with CurvatureProbe(model, layer_types="all", accumulate=accumulate) as probe:  # type: ignore[arg-type]
                found[accumulate] = cost(probe, SEQUENCES)
        return found


def ring(found: Cost, data: int) -> float:
    """Bytes that a rank sends in rings: (r - 1)/r of what a reduce-scatter is given, twice that of an all-reduce."""
    return (data - 1) / data * (found.scattered + 2 * found.reduced)


def rows(llamas: Sequence[Llama] = LLAMAS, meshes: Sequence[tuple[int, int]] = MESHES) -> Iterator[list[str]]:
    """Of the table."""
    for shape in llamas:
        for data, tensor in meshes:
            found = costs(shape, data, tensor)
            diagonal, trace = found["diagonal"], found["trace"]
            yield [
                shape.name,
                f"{data * tensor:,}",
                f"{data} × {tensor}",
                f"{diagonal.kept / 1e6:,.1f} MB",
                f"{ring(diagonal, data) / 1e6:,.0f} MB",
                f"{trace.kept / 1e3:,.0f} kB",
                f"{ring(trace, data) / 1e3:,.0f} kB",
            ]


COLUMNS = ("shape", "ranks", "data × tensor", "diagonal: kept", "sent a step", "trace: kept", "sent a step")


def main() -> None:
    """Print the table."""
    table = Table(title=f"Of each rank, float32, {SEQUENCES} sequences a data rank", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "shape" else "right")
    for row in rows():
        table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
