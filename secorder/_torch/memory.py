"""How much memory a device has left."""

import torch

__all__ = ["free_memory"]


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a CUDA device, what PyTorch holds in reserve among them; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + reserve)
