"""PyTorch's own losses, of which more is known than what a call of them tells."""

import math
from functools import partial
from types import FunctionType
from typing import Any, Literal

from torch import Tensor, nn

from .._torch.modules import backward_hooks, forward_hooks


def known_loss(loss_fn: Any) -> bool:
    """Whether a loss is a function or module of PyTorch's own: without state, without random numbers, with no tensors.

    Of all samples alike it is then, whatever their order, and vmap may run it.
    """
    loss_fn = getattr(loss_fn, "__wrapped__", loss_fn)
    if isinstance(loss_fn, nn.Module):
        plain = type(loss_fn).__module__ == "torch.nn.modules.loss" and not forward_hooks(loss_fn)
        return plain and not backward_hooks(loss_fn) and "forward" not in vars(loss_fn)
    if isinstance(loss_fn, partial):
        given = (*loss_fn.args, *loss_fn.keywords.values())
        return known_loss(loss_fn.func) and all(isinstance(x, (str, int, float, bool)) for x in given)
    return isinstance(loss_fn, FunctionType) and loss_fn.__module__ == "torch.nn.functional"


#: PyTorch's losses that are sums or means over the elements of dim 0 of outputs and targets, as functions and modules.
_ROW_BY_ROW = frozenset({
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "kl_div", "poisson_nll_loss", "soft_margin_loss", "CrossEntropyLoss", "NLLLoss",
    "MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCELoss", "BCEWithLogitsLoss", "KLDivLoss", "PoissonNLLLoss",
    "SoftMarginLoss",
})  # fmt: skip


def loss_of_rows(loss_fn: Any) -> bool:
    """Whether a loss is by its definition made of losses of the rows of the outputs, for rows in dim 0."""
    return known_loss(loss_fn) and _options(loss_fn)[1] in _ROW_BY_ROW


#: Those of them that compare outputs with targets element by element.
_BY_ELEMENT = _ROW_BY_ROW - {"cross_entropy", "nll_loss", "CrossEntropyLoss", "NLLLoss"}

#: What may be passed to such a loss beside outputs and targets: nothing that weighs samples or elements.
_OPTIONS = frozenset({
    "reduction", "ignore_index", "label_smoothing", "beta", "delta", "log_target", "log_input", "full", "eps",
})  # fmt: skip


def made_of_samples(loss_fn: Any, output: Any, targets: Any) -> bool:
    """Whether a loss is PyTorch's own, without weights, which may be those of samples, and broadcasts nothing."""
    options, name = _options(loss_fn) if known_loss(loss_fn) else (None, "")
    tensors = isinstance(output, Tensor) and isinstance(targets, Tensor)
    return options is not None and (not tensors or name not in _BY_ELEMENT or output.shape == targets.shape)


def share_of_samples(loss_fn: Any, output: Any, targets: Any, count: int) -> float | None:
    """The number c for which the loss of the batch is c Σ_n ℓ_n, as the loss's own definition tells.

    A sum over elements or samples has c = 1, a mean over as many of them in each sample c = 1/N. None where the
    definition does not tell: of another loss, with weights, with labels that do not count, of tensors that are
    broadcast.
    """
    if not (isinstance(output, Tensor) and isinstance(targets, Tensor) and loss_of_rows(loss_fn)):
        return None
    options, name = _options(loss_fn)
    if options is None or not output.shape[:1] == targets.shape[:1] == (count,):
        return None
    reduction = options.get("reduction", "mean")
    if name in _BY_ELEMENT:
        if output.shape != targets.shape:
            return None
        alone = {"sum": 1.0, "mean": 1 / count, "batchmean": 1 / count}
        return alone.get(reduction) if reduction != "batchmean" or "kl" in name.lower() else None
    if output.dim() < 2:  # classes of a single sample
        return None
    if targets.is_floating_point():
        whole = output.shape == targets.shape
    else:
        ignored = options.get("ignore_index", -100)
        whole = (count, *output.shape[2:]) == targets.shape and not bool((targets == ignored).any())
    return {"sum": 1.0, "mean": 1 / count}.get(reduction) if whole else None


def defined_reduction(loss_fn: Any, targets: Any) -> Literal["mean", "sum"] | None:
    """Whether a loss of PyTorch's own is a mean or a sum over samples; None where its definition does not tell.

    That depends on the targets: labels that do not count may be among them.
    """
    if not loss_of_rows(loss_fn) or not isinstance(targets, Tensor):
        return None
    options, name = _options(loss_fn)
    if options is None or (name not in _BY_ELEMENT and bool((targets == options.get("ignore_index", -100)).any())):
        return None
    reduction = options.get("reduction", "mean")
    return "mean" if reduction == "batchmean" else reduction if reduction in ("mean", "sum") else None


def softmax_scale(loss_fn: Any, output: Tensor, targets: Tensor) -> float | None:
    """The c for which a sample's loss has the Hessian c (diag p − p pᵀ) at each position, p a softmax over dim 1.

    None where it is no cross entropy of labels, whatever they are smoothed by, or its share is not known.
    """
    options, name = _options(loss_fn)
    if name not in ("cross_entropy", "CrossEntropyLoss") or targets.is_floating_point() or output.shape[1] < 2:
        return None
    mean = (options or {}).get("reduction", "mean") == "mean"
    return 1 / math.prod(output.shape[2:]) if mean else 1.0


def _options(loss_fn: Any) -> tuple[dict[str, Any] | None, str]:
    """What a known loss was given, by name; None where that is more than :data:`_OPTIONS`. And what it is called."""
    loss_fn = getattr(loss_fn, "__wrapped__", loss_fn)
    if isinstance(loss_fn, nn.Module):
        kept = {name: value for name, value in vars(loss_fn).items() if name in _OPTIONS}
        weighs = [*loss_fn.buffers(), *(value for value in kept.values() if isinstance(value, Tensor))]
        return (None if weighs else kept), type(loss_fn).__name__
    given: dict[str, Any] = {}
    while isinstance(loss_fn, partial):
        if loss_fn.args:
            return None, ""
        given = loss_fn.keywords | given
        loss_fn = loss_fn.func
    return (given if given.keys() <= _OPTIONS else None), loss_fn.__name__
