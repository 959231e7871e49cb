"""Is the loss that a model returns made of its samples' losses as is told? Seen on a few samples of a batch.

Of L = Σ_n c_n ℓ_n, with the same ℓ_n in any batch that holds sample n, two parts of a batch tell the whole: each part's
loss times what its weights are multiplied by in the whole. A loss that weights its samples by labels which the model
gets, and not as is told, does not add up so.
"""

from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._torch.modules import evaluating
from .._torch.pytree import map_tensors, tensors_in
from .._torch.random_state import cuda_devices, get_random_state, same_random_state
from .._torch.transforms import inside_transform
from .._torch.vjp import fresh_generator
from ..layers.dtypes import rounding
from ..oneshot.isolation import isolate
from .attribution import Attribution
from .reduction import weights_of

if TYPE_CHECKING:
    from .fisher import OnlineFisher

__all__ = ["told_otherwise", "watch_loss"]

#: So many samples are looked at, at most, and so many of them are one of the parts: an odd number, of which no weights
#: of two classes that are equally frequent make the part's mean that of the whole.
SAMPLES, PART = 8, 3

_WEIGHTED = (
    "the loss that the model returns is neither the mean nor the sum of its samples' losses (padding, class weights), "
    "or not weighted as reduction= tells: pass reduction= with a function of the model's arguments that returns the "
    "weights c_n of L = Σ_n c_n ℓ_n, such as secorder.token_weights."
)
_SUM = 'the loss that the model returns is the sum of its samples\' losses: pass reduction="sum".'
_MEAN = 'the loss that the model returns is the mean of its samples\' losses: pass reduction="mean".'


def told_otherwise(model: nn.Module, reduction: Any, found: Attribution, args: Any, kwargs: Any) -> str:
    """Why a loss that the model returns is not made as is told; empty where it is, or where that cannot be seen.

    Args:
        model: the model, which is run in eval mode: with dropout, each part would have another loss.
        reduction: ``"mean"``, ``"sum"`` or a function, as told.
        found: where the samples are in the arguments.
        args: of one forward.
        kwargs: of it.
    """
    count = None if found.grouping is not None else found.count((args, kwargs))
    if count is None or count < 2 or found.coupled or (found.outputs and None not in found.outputs):
        return ""
    ids = torch.randperm(count, generator=fresh_generator(), device="cpu")[:SAMPLES]
    parts = ids.split([PART, len(ids) - PART] if len(ids) > PART + 1 else [1, len(ids) - 1])
    take = partial(_samples, found, count, (args, kwargs))
    drawn, cuda = False, cuda_devices(model)

    def run(copied: Any) -> float:
        nonlocal drawn
        before = get_random_state(cuda)
        loss = _only_loss(model(*copied[0], **copied[1]))
        drawn = drawn or not same_random_state(before, get_random_state(cuda))
        return loss

    try:
        with isolate(model, None, []) as isolated, evaluating(model):
            losses: list[float] = [isolated.run(run, take(some)) for some in (ids, *parts)]
            whole, others, bound = losses[0], losses[1:], _rounding(model) * sum(map(abs, losses))

            def holds(kind: Any) -> bool:
                shares = [_share(kind, take, ids, some) for some in parts]
                told = sum(share * loss for share, loss in zip(shares, others, strict=True))
                return abs(told - whole) <= bound

            if drawn or holds(reduction):
                return ""
            for order in (ids.flip(0), ids.roll(1), ids.roll(2)):  # which matters where a generator is in the loss
                if not abs(isolated.run(run, take(order)) - whole) <= bound:
                    return ""
            if holds("sum"):  # or divided by a number that the model is given
                return "" if _has_numbers(args, kwargs) else _SUM
            return _MEAN if holds("mean") else _WEIGHTED
    except Exception:  # such as of a batch that the model does not accept, or that has no such loss
        return ""


def watch_loss(fisher: "OnlineFisher", output: Any, reason: str) -> None:
    """Mark all layers for a reason, if there is one, once a backward begins at a loss that the model has returned."""

    def begins(_: Tensor) -> None:
        if not inside_transform():
            fisher.troubles.guarded(None, (), fisher.troubles.mark, list(fisher.sums), reason)

    for tensor in tensors_in(output) if reason else ():
        if not tensor.dim() and tensor.grad_fn is not None:
            tensor.register_hook(begins)


def _samples(found: Attribution, count: int, arguments: Any, ids: Tensor) -> Any:
    """The arguments of some samples."""
    dims = iter(found.dims)

    def taken(tensor: Tensor) -> Tensor:
        dim = next(dims)
        shared = dim is None or tensor.shape[dim] != count
        return tensor if shared else tensor.index_select(dim or 0, ids.to(tensor.device))

    return map_tensors(taken, arguments)


def _only_loss(output: Any) -> float:
    """The loss that a model returns.

    Raises:
        ValueError: there is none, or several, or it is not finite.
    """
    (loss,) = [float(t.detach()) for t in tensors_in(output) if not t.dim() and t.requires_grad]
    if not isfinite(loss):
        raise ValueError(loss)
    return loss


def _share(kind: Any, take: Callable[[Tensor], Any], ids: Tensor, some: Tensor) -> float:
    """What the weights of some samples in their own batch are multiplied by in that of all.

    Raises:
        ValueError: these are not in one proportion, so that the loss of the part tells nothing of the whole's.
    """
    if isinstance(kind, str):
        return len(some) / len(ids) if kind == "mean" else 1.0
    (args, kwargs), (own_args, own_kwargs) = take(ids), take(some)
    here, own = weights_of(kind, args, kwargs, len(ids)), weights_of(kind, own_args, own_kwargs, len(some))
    if here is None or own is None:
        return len(some) / len(ids)
    places = (ids[:, None] == some).int().argmax(0)
    here, own = here.cpu().double()[places], own.cpu().double()
    share = float(here.sum() / own.sum())
    if not torch.allclose(here, share * own, rtol=1e-3):
        raise ValueError(share)
    return share


def _rounding(model: nn.Module) -> float:
    """That of the least precise of the model's parameters, or of float32, in which models take losses."""
    kinds = {torch.float32, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return max(map(rounding, kinds))


def _has_numbers(args: Any, kwargs: Any) -> bool:
    """Whether the model is called with a number, such as one of tokens, which its loss may be divided by."""
    return any(
        (isinstance(x, (int, float)) and not isinstance(x, bool)) or (isinstance(x, Tensor) and not x.dim())
        for x in (*args, *kwargs.values())
    )
