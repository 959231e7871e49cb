"""``python -m tests.benchmarks.large``: a decoder of GPT-2 small's shape, its head tied to its embedding.

Time and peak memory of a training step, bare and with a probe on every linear layer: 124 million parameters, of which
38 million are the table that embedding and head share.
"""

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from secorder import CurvatureProbe

from .memory import peak_memory, size_of
from .timing import alternate


class Block(nn.Module):
    """A causal transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """GPT-2 small: 12 blocks of width 768, 50,257 words, head and embedding one table."""

    def __init__(self, words: int = 50257, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(1024, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        return self.head(self.norm(self.blocks(self.words(words) + self.places(places))))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="A decoder of GPT-2 small's shape.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Decoder()
    words = torch.randint(model.words.num_embeddings, (options.batch, options.tokens + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(words[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten()).backward()
        optimizer.step()

    step()
    parameters = size_of(model.parameters())
    optimizer.zero_grad()
    bare_memory = peak_memory(step) + parameters
    probe = CurvatureProbe(model)
    for _ in range(4):  # the batches 1, 2 and 4 are checked
        step()
    optimizer.zero_grad()
    memory = peak_memory(step) + parameters
    own = size_of(probe.fisher_diagonal().values())

    def bare() -> None:
        probe.detach()
        step()
        probe.attach()

    times = alternate({"bare": bare, "probe": step}, options.repeats)
    table = Table(title=f"GPT-2 small's shape, N={options.batch}, {options.tokens} tokens", title_justify="left")
    for column in ("", "time", "ratio", "peak memory", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("bare step", f"{times['bare']:.2f} s", "1.00×", f"{bare_memory / 1e6:.0f} MB", "1.00×")
    for name, seconds, size in (
        ("with probe, accumulators apart", times["probe"], memory),
        ("with probe and accumulators", times["probe"], memory + own),
    ):
        ratios = f"{seconds / times['bare']:.2f}×", f"{size / 1e6:.0f} MB", f"{size / bare_memory:.2f}×"
        table.add_row(name, f"{seconds:.2f} s", *ratios)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
