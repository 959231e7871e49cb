"""Collective operations on tensors of any device."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from secorder._torch.collectives import all_reduce
from secorder.monitor.training import mean_loss


class Elsewhere(torch.Tensor):
    """On a device that the group knows nothing of."""

    device = torch.device("meta")  # type: ignore[assignment]

    def to(self, *_: Any) -> Tensor:
        """On the group's device."""
        return self.as_subclass(Tensor) * 1


@pytest.mark.parametrize("backends", ["cpu:gloo", "cpu:gloo,cuda:nccl"])
def test_tensors_of_another_device_make_the_way_over_the_groups(backends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[type] = []

    def doubled(tensor: Tensor, **_: Any) -> None:
        reduced.append(type(tensor))
        tensor.mul_(2)

    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(dist, "all_reduce", doubled)
    for tensor in (torch.ones(3), torch.ones(3).as_subclass(Elsewhere)):
        all_reduce(tensor)
        assert tensor.tolist() == [2, 2, 2]
    assert reduced == [Tensor, Tensor]
    assert mean_loss(6.0, 2, together=True) == 3.0
