"""Does what all samples decide together change their outputs?"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import CouplingError, per_layer_fisher_diagonal
from secorder.oneshot import together
from secorder.oneshot.isolation import isolate
from secorder.oneshot.together import alone_as_together

from ..helpers import Fn, data


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (lambda x: 2.0 if bool(x.mean() > 0) else 1.0, False),
        (lambda x: float(x.median()), False),
        (len, False),
        (lambda x: (x.mean(1, keepdim=True) > 0) + 1.0, True),
        (lambda x: nn.functional.dropout(torch.ones_like(x)), True),
        (lambda x: (torch.rand(len(x), 1) < 0.5) + 1.0, True),  # which places may have in common by chance
        (lambda x: (torch.rand(len(x), 1), torch.rand(()))[1], True),
        (lambda x: torch.tensor([1.0, 1, 2, 2, 3, 3])[: len(x), None], True),
        (lambda x: torch.stack([row * k for row, k in zip(x.sign(), [1, 1, 2, 2, 3, 3], strict=False)]), True),
    ],
)
@pytest.mark.parametrize("few", [3, 64])
def test_what_all_samples_decide_together_is_seen(
    factor: Any, expected: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "FEW", few)
    x = torch.tensor([-1.0, 2.0, 3.0, 1.0, 2.0, 3.0])[:, None].expand(6, 4).contiguous()
    for _ in range(10):
        with isolate(Fn(lambda x: x * factor(x)), None, []) as isolated:
            assert alone_as_together(isolated, x, 6, 0, isolated.forward) is expected


def test_outputs_of_one_sample_each() -> None:
    x = torch.randn(6, 4)
    with isolate(Fn(lambda x: x.unbind()), None, []) as isolated:
        assert alone_as_together(isolated, x, 6, 0, isolated.forward)


@pytest.mark.parametrize("few", [3, 64])
def test_numbers_that_round_otherwise_in_another_batch(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a network in training for few bits do, where products of other sizes are made by other code."""
    monkeypatch.setattr(together, "FEW", few)

    def rounds(x: Tensor) -> Tensor:
        return torch.cat([x[:1] + len(x) / 64, x[1:]]) if len(x) < 6 else x

    x = torch.randn(6, 4)
    with isolate(Fn(rounds), None, []) as isolated:
        assert alone_as_together(isolated, x, 6, 0, isolated.forward)


def test_a_fisher_of_what_all_samples_decide_is_refused() -> None:
    class Decides(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if bool(x.mean() > x[:, 0].median()) else 1.0)

    x = torch.tensor([-1.0, 2.0, 3.0, 1.0, 2.0, 3.0])[:, None] + torch.eye(6, 4)
    with pytest.raises(CouplingError):
        per_layer_fisher_diagonal(Decides(4, 3), nn.functional.cross_entropy, x, data()[1][:6] % 3)
