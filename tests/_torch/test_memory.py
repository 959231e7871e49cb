"""What is free on a device."""

import subprocess
import sys

import pytest
import torch

from secorder._torch import memory
from secorder._torch.memory import free_memory, most_bytes, unmetered


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


def test_the_most_that_is_alive_at_once() -> None:
    """Of a chain of tensors two at a time; views and what is overwritten count once; what was there does not count."""
    x = torch.randn(1000, dtype=torch.float32)

    def work() -> None:
        y = x
        for _ in range(5):
            y = y.exp()
        y.view(10, 100).t().mul_(2)

    assert most_bytes(work) == 2 * 4000
    assert most_bytes(lambda: x.view(10, 100).add_(1)) == 0
    assert most_bytes(lambda: [x.exp() for _ in range(5)]) == 5 * 4000


def test_what_is_not_to_be_seen() -> None:
    """By the innermost meter; without one nothing changes."""
    x = torch.randn(1000, dtype=torch.float32)

    def work() -> None:
        with unmetered():
            assert most_bytes(x.exp) == 4000
            _kept = x.exp()
        x[:10].exp()

    assert most_bytes(work) == 40
    work()


def test_a_meter_loads_no_compiler() -> None:
    script = "from secorder._torch.memory import most_bytes; import sys, torch; most_bytes(torch.ones(1).exp)"
    subprocess.run([sys.executable, "-c", f"{script}; assert 'torch._dynamo' not in sys.modules"], check=True)


def test_what_backward_keeps_and_frees_counts() -> None:
    x = torch.randn(1000, dtype=torch.float32, requires_grad=True)

    def work() -> None:
        x.exp().exp().sum().backward()  # which keeps what both return, and makes a gradient of each at a time

    assert 3 * 4000 <= most_bytes(work) <= 5 * 4000
