"""How much memory a device has left."""

import time
from functools import lru_cache

import torch

__all__ = ["free_memory"]


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a CUDA device, what PyTorch holds in reserve among them; None elsewhere.

    Asked for once a second at most: the driver takes milliseconds to tell, as long as a small model's step.
    """
    return None if device.type != "cuda" else _told_in(int(time.monotonic()), device)


@lru_cache(maxsize=16)
def _told_in(second: int, device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + reserve)
