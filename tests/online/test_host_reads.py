"""In a steady recorded step nothing is read on the host: what would stall an accelerator at each layer."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secorder import CurvatureProbe
from secorder.layers import one_by_one

from ..helpers import in_sight_of_modes, mlp, no_warnings
from ..reference import assert_all_close, assert_close, fisher_by_sample

#: Operators whose result's value or shape the host waits for.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "_unique2", "unique_dim", "masked_select")


class Reads(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.up, self.down, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Language(nn.Module):
    """An embedding and a head that share a table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids)).mean(1)))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
    )


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "mlp": (mlp, lambda: torch.randn(6, 4), 3),
    "cnn": (cnn, lambda: torch.randn(6, 2, 6, 6), 3),
    "block": (Block, lambda: torch.randn(6, 5, 8), 3),
    "language": (Language, lambda: torch.randint(7, (6, 5)), 7),
}


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize(
    "options", [{}, {"on_nonfinite": "keep"}, {"loss_scale": 2.0}, {"reduction": "sum"}, {"accumulate": "trace"}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_steady_step_reads_nothing(
    kind: str, options: dict[str, Any], decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_sight_of_modes(monkeypatch)
    monkeypatch.setattr(one_by_one, "at_hand", lambda tensor: None)  # as of an accelerator, which is not waited for
    build, inputs_of, classes = KINDS[kind]
    model, inputs, targets = build(), inputs_of(), torch.randint(classes, (6,))
    reduction = options.get("reduction", "mean")
    scale = options.get("loss_scale", 1.0)

    def step() -> Reads:
        model.zero_grad()
        with Reads() as reads:
            (F.cross_entropy(model(inputs), targets, reduction=reduction) * scale).backward()
        return reads

    bare = step().counts
    with CurvatureProbe(model, "all", decay=decay, **{"reduction": reduction, **options}) as probe:
        for _ in range(3):
            step()
        monkeypatch.setattr(probe._attributions, "scheduled", lambda *_: False)  # a steady batch
        with no_warnings():  # it is not left out
            counts = step().counts
        assert counts == bare, counts
        expected = fisher_by_sample(model, F.cross_entropy, inputs, targets, 6)
        if "accumulate" not in options:
            assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
            return
        for layer in probe._fisher.layers:
            total = torch.stack([expected[layer.parameter_name(name)].sum() for name in layer.parameters]).sum()
            assert_close(torch.tensor(probe.fisher_trace()[layer.name].value), total)
