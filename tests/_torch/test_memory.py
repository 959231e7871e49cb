"""What is free on a device."""

import pytest
import torch

from secorder._torch import memory
from secorder._torch.memory import free_memory


def test_of_the_cpu_it_is_not_told() -> None:
    assert free_memory(torch.device("cpu")) is None


def test_what_pytorch_holds_in_reserve_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(memory.time, "monotonic", lambda: -1.5)
    assert free_memory(torch.device("cuda", 0)) == 120
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1000))
    assert free_memory(torch.device("cuda", 0)) == 120  # in the same second
    monkeypatch.setattr(memory.time, "monotonic", lambda: -3.5)
    assert free_memory(torch.device("cuda", 0)) == 20
