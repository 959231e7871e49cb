"""Cross entropies are recognised by their graph."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder._torch.cross_entropy import is_cross_entropy_of_rows
from secorder._torch.graph import tells_recomputation

SHAPE = (4, 3, 5)
LABELS = torch.arange(12) % 5

OF_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda z: F.cross_entropy(z.flatten(0, 1), LABELS),
    "shifted": lambda z: F.cross_entropy(z[:, :-1].flatten(0, 1), LABELS[:8], reduction="sum"),
    "contiguous": lambda z: F.cross_entropy(z[:, 1:].contiguous().view(-1, 5), LABELS[:8], ignore_index=2),
    "written out": lambda z: F.nll_loss(z.view(-1, 5).log_softmax(-1), LABELS).reshape(()),
}

OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "classes in dim 1": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS.view(4, 3)),
    "of columns": lambda z: F.cross_entropy(z[:, 0].t(), LABELS[:5] % 4),
    "over samples": lambda z: F.nll_loss(z.flatten(0, 1).log_softmax(0), LABELS),
    "in other rows": lambda z: F.cross_entropy(z.reshape(15, 4), LABELS.repeat(2)[:15] % 4),
    "of some classes": lambda z: F.cross_entropy(z.flatten(0, 1)[:, :3], LABELS % 3),
    "weighted": lambda z: F.cross_entropy(z.flatten(0, 1), LABELS, weight=torch.rand(5)),
    "smoothed": lambda z: F.cross_entropy(z.flatten(0, 1), LABELS, label_smoothing=0.1),
    "times a statistic": lambda z: F.cross_entropy(z.flatten(0, 1), LABELS) * z.detach().std(),
    "a root": lambda z: F.cross_entropy(z.flatten(0, 1), LABELS).sqrt(),
    "of products": lambda z: F.cross_entropy((z * 2).flatten(0, 1), LABELS),
    "of chosen rows": lambda z: F.cross_entropy(z.flatten(0, 1)[LABELS > 1], LABELS[LABELS > 1]),
    "two": lambda z: F.cross_entropy(z[:, 0], LABELS[:4]) + F.cross_entropy(z[:, 1], LABELS[:4]),
}


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
@pytest.mark.parametrize("name", OF_ROWS)
def test_cross_entropies_of_rows(name: str) -> None:
    z = torch.randn(SHAPE, requires_grad=True)
    assert is_cross_entropy_of_rows(OF_ROWS[name](z), z)
    assert not is_cross_entropy_of_rows(OF_ROWS[name](z.exp()), z)


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    z = torch.randn(SHAPE, requires_grad=True)
    assert not is_cross_entropy_of_rows(OTHERS[name](z), z)
