"""How many samples a batch holds, and where they are in its tensors."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError, InvalidTypeError
from secorder.batch import batch_size, require_agreement, sample_dimension

from .reference import assert_all_close, hessian_by_element


@pytest.mark.parametrize(
    ("inputs", "targets", "dim", "count"),
    [
        (torch.zeros(5, 3), torch.zeros(5), 0, 5),
        (torch.zeros(3, 5), torch.zeros(5), 1, 5),
        ((torch.zeros(1, 2), torch.zeros(5, 3)), torch.zeros(5), 0, 5),  # one conditioning row for all
        ({"x": torch.zeros(5, 3)}, torch.zeros(20), 0, 5),  # four labels a sample
        (torch.zeros(1, 3), None, 0, 1),
    ],
)
def test_batch_size(inputs: object, targets: object, dim: int, count: int) -> None:
    assert batch_size(inputs, targets, dim) == count


def test_batches_that_are_none() -> None:
    with pytest.raises(InvalidTypeError, match="samples in dim 0"):
        batch_size("text", None)
    with pytest.raises(InvalidArgumentError, match="empty"):
        batch_size(torch.zeros(0, 3), None)
    with pytest.raises(InvalidArgumentError, match="5 samples and targets 4"):
        batch_size(torch.zeros(5, 3), torch.zeros(4))
    with pytest.raises(InvalidArgumentError, match="agree"):
        require_agreement(torch.zeros(5, 2), torch.zeros(20), 5, 0)
    require_agreement(torch.zeros(20, 2), torch.zeros(20), 5, 0)  # the model returned as many rows


def test_where_samples_are() -> None:
    assert sample_dimension(torch.zeros(4, 5), 5, 1) == 1
    assert sample_dimension(torch.zeros(5, 4), 5, 1) == 0
    assert sample_dimension(torch.zeros(3), 5) is None
    assert batch_size((torch.zeros(1, 3), torch.zeros(7, 3), torch.zeros(5, 3)), None) == 7
    assert batch_size((torch.zeros(1, 3), torch.zeros(1, 3)), None) == 1


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: Tensor


class Plain:
    def __init__(self, x: Tensor, scale: Tensor) -> None:
        self.content, self.name = {"x": x}, "plain"
        self.scale = scale


class Net(nn.Module):
    """Takes a batch of any kind, by its attributes or items."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, batch: Any = None, **items: Tensor) -> Any:
        if isinstance(batch, Plain):
            items = {**batch.content, "scale": batch.scale}
        elif isinstance(batch, Frozen):
            items = vars(batch)
        y = self.out(torch.tanh(self.fc(items["x"])) * items["scale"])
        return Frozen(y, items["scale"]) if isinstance(batch, Frozen) else y


def loss_of(output: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.x if isinstance(output, Frozen) else output, targets)


@pytest.mark.parametrize("kind", [Frozen, Plain, lambda x, scale: UserDict(scale=scale, x=x)])
def test_batches_of_any_kind_are_measured(kind: Callable[[Tensor, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, x, scale, targets = Net(), torch.randn(6, 4), torch.rand(6, 1), torch.randint(3, (6,))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(6):
        loss = loss_of(model(x=x[n : n + 1], scale=scale[n : n + 1]), targets[n : n + 1])
        for total, g in zip(expected.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += g**2 / 6
    batch = kind(x, scale)
    with CurvatureProbe(model, reduction="mean") as probe:
        output = model(**batch) if isinstance(batch, UserDict) else model(batch)
        loss_of(output, targets).backward()
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        assert_all_close(probe.fisher_diagonal(loss_of, batch, targets).by_parameter(), expected)
        hessian = probe.hessian_diagonal(loss_of, batch, targets, method="exact").by_parameter()
    items = {"x": x, "scale": scale}
    assert_all_close(hessian, hessian_by_element(model, loss_of, items, targets))
