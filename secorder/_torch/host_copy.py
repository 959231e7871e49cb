"""What the host knows of a tensor without waiting, and asynchronous copies to it from an accelerator."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def at_hand(numbers: Sequence[Tensor]) -> list[Any] | None:
    """The numbers of tensors on one device without dimensions; None where the host would wait for them.

    One by one, since they are few: to stack them costs more.
    """
    return [x.tolist() for x in numbers] if numbers[0].is_cpu else None


def goes_to_host(tensor: Tensor, there: Tensor) -> bool:
    """Whether a copy of a tensor to where another one is leaves a CUDA device for the host."""
    return tensor.is_cuda and there.device.type == "cpu"


def begin_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor of a CUDA device to the host, on a stream of its own.

    What is returned waits for the copy, in page-locked memory, which PyTorch keeps for the next one of its size.
    """
    stream = _stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))  # which makes the tensor
    with torch.cuda.stream(stream):
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        done = stream.record_event()
    tensor.record_stream(stream)  # whose memory is not given away before

    def arrived() -> Tensor:
        done.synchronize()
        return copy

    return arrived


@lru_cache(maxsize=16)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
