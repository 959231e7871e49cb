"""Are samples independent of one another in the model, and where are they in each layer?

Independence is asked of the forward pass: while some samples are replaced by others, the rest must keep their output.
The sets of replaced samples are chosen so that for every ordered pair of samples some set holds the second and not the
first: an influence of one sample on another shows unless it is below rounding for the very replacement.
"""

from collections.abc import Callable
from itertools import combinations, islice
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from .capture import CaptureHook
from .loan import Loan
from .trees import map_tensors, sample_dimension, tensors_in

__all__ = ["independent_by_structure", "outputs_independent", "separating_masks"]

_ROWWISE: tuple[type[nn.Module], ...] = (
    nn.Sequential, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.LogSigmoid, nn.Softsign,
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


def independent_by_structure(model: nn.Module) -> bool:
    """Whether the model is a chain of torch's own layers that all treat rows of dim 0 alone."""

    def rowwise(module: nn.Module) -> bool:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if "forward" in module.__dict__ or not all(isinstance(hook, CaptureHook) for hook in hooks):
            return False
        if type(module) is nn.Flatten:
            return module.start_dim >= 1
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            assert isinstance(module, nn.modules.batchnorm._BatchNorm)
            return not module.training and module.running_mean is not None
        return type(module) in _ROWWISE

    return all(rowwise(module) for module in model.modules())


def separating_masks(count: int) -> Tensor:
    """Masks (B, N), B about log₂ N: for every ordered pair (n, m) some mask holds m and not n.

    Each sample gets a different word of B bits with exactly ⌊B/2⌋ ones, so that no word covers another (Sperner).
    """
    if count == 1:
        return torch.zeros(0, 1, dtype=torch.bool)
    bits = next(b for b in range(2, count + 2) if comb(b, b // 2) >= count)
    masks = torch.zeros(bits, count, dtype=torch.bool)
    for sample, word in enumerate(islice(combinations(range(bits), bits // 2), count)):
        masks[list(word), sample] = True
    return masks


def outputs_independent(
    loan: Loan, inputs: Any, count: int, sample_dim: int, forward: Callable[[Any], Any] | None = None
) -> bool:
    """Whether every sample's output stays as it is while others are replaced by their neighbours in the batch.

    Args:
        loan: the borrowed model.
        inputs: the batch.
        count: its number of samples.
        sample_dim: where they are in the inputs.
        forward: how to run the model on inputs; by default as a one-shot call does.
    """
    run = forward or loan.forward
    with torch.no_grad():
        base = list(tensors_in(run(inputs)))
        for mask in separating_masks(count):
            changed = tensors_in(run(map_tensors(lambda t, m=mask: _replaced(t, m, count, sample_dim), inputs)))
            for before, after in zip(base, changed, strict=True):
                dim = sample_dimension(before, count, sample_dim)
                if dim is None or not before.is_floating_point():
                    continue
                kept = ~mask.to(before.device)
                bound = 1024 * torch.finfo(before.dtype).eps * before.abs().amax()
                if not bool(((before - after).movedim(dim, 0)[kept].abs() <= bound).all()):
                    return False
    return True


def _replaced(tensor: Tensor, mask: Tensor, count: int, sample_dim: int) -> Tensor:
    dim = sample_dimension(tensor, count, sample_dim)
    if dim is None:
        return tensor
    here = mask.to(tensor.device).view(*(-1 if d == dim else 1 for d in range(tensor.dim())))
    return torch.where(here, tensor.roll(1, dim), tensor)
