"""The heaviest columns of layers with a rule, and of those that are measured sample by sample."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe

from ..helpers import seed, seeded
from ..reference import assert_all_close, ggn_by_sample

N, C = 5, 4


class Clamped(nn.Module):
    """A hook on a tensor keeps the graph from telling anything: what has no rule runs sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(3, 6), nn.Linear(6, C)
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x) * self.gain
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        found: Tensor = self.head(h.tanh())
        return found


def test_all_of_the_weight_is_exact_with_a_rule_and_without() -> None:
    seed()
    model, x, targets = Clamped().double(), torch.randn(N, 3, dtype=torch.float64), torch.arange(N) % C
    with CurvatureProbe(model, "all") as probe:
        found = probe.fisher_diagonal(F.cross_entropy, x, targets, fisher_type="type-2", rtol=1e-12, generator=seeded())
    assert {name: info.strategy for name, info in found.info.items()} == {
        "": "per-sample", "inside": "rule", "head": "rule"
    }  # fmt: skip
    assert_all_close(found.by_parameter(), ggn_by_sample(model, F.cross_entropy, x, targets))
