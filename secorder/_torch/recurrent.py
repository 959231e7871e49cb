"""What recurrent layers that run as one operation keep for their backward."""

import torch
from torch import Tensor

from .graph import Node, saved

#: oneDNN fills rows up to so many bytes, and one such piece more where rows would fall on the same lines of a cache.
PIECE, SAME_LINES = 64, 256


def kept_gates(node: Node, steps: int, count: int, width: int) -> Tensor | None:
    """The four gates of an LSTM after their activations, shape ``(steps, N, 4, width)``, where they seem to be kept.

    A view of the workspace of oneDNN's node of one layer and direction, whose order nothing promises: what is found is
    to be compared with what was computed.
    """
    outputs, workspace = saved(node, "result0"), saved(node, "result3")
    unit = PIECE // outputs.element_size()
    row = -(-4 * width // unit) * unit
    row += unit if row % SAME_LINES == 0 else 0
    needed = steps * count * row
    if (
        outputs.dtype is not torch.float32
        or workspace.dim() != 1
        or workspace.numel() * workspace.element_size() < needed * outputs.element_size()
    ):
        return None
    rows = workspace.view(outputs.dtype)[:needed].view(steps, count, row)
    gates: Tensor = rows[:, :, : 4 * width].unflatten(2, (4, width))
    return gates
