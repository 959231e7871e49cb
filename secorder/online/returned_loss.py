"""Is the loss that a model returns made of its samples' losses as is told? Seen on a few samples of a batch.

Of L = Σ_n c_n ℓ_n, with the same ℓ_n in any batch that holds sample n, two parts of a batch tell the whole: each part's
loss times what its weights are multiplied by in the whole. A loss that weights its samples by labels which the model
gets, and not as is told, does not add up so.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._torch.modules import evaluating
from .._torch.pytree import map_tensors
from .._torch.random_state import cuda_devices, get_random_state, same_random_state
from .._torch.transforms import inside_transform
from .._torch.vjp import fresh_generator
from ..errors import InvalidArgumentError
from ..layers.dtypes import rounding
from ..oneshot.isolation import isolate
from .attribution import Attribution
from .beside import Beside, made_beside, watch_beside
from .loss_coupling import watch_coupling
from .loss_scale import watch_scale
from .record import ForwardRecord
from .reduction import token_weights, weights_of

if TYPE_CHECKING:
    from .hooks import Attachment

__all__ = ["told_otherwise", "watch_losses"]

#: So many samples are looked at, at most, and so many of them are one of the parts: an odd number, of which no weights
#: of two classes that are equally frequent make the part's mean that of the whole.
SAMPLES, PART = 8, 3

#: What is rounding of a loss for certain, in units in the last place; and how many times that of the same samples, each
#: of them twice, may be met elsewhere. Losses of an untrained model are nearly alike, whatever weighs its samples.
UNITS, MEASURED = 32, 64.0

_WEIGHTED = (
    "the loss that the model returns is neither the mean nor the sum of its samples' losses (padding, class weights, "
    "a statistic of the batch), or not weighted as reduction= tells: pass reduction= with a function of the model's "
    "arguments that returns the weights c_n of L = Σ_n c_n ℓ_n, such as secorder.token_weights."
)
_SUM = 'the loss that the model returns is the sum of its samples\' losses: pass reduction="sum".'
_MEAN = 'the loss that the model returns is the mean of its samples\' losses: pass reduction="mean".'


def told_otherwise(model: nn.Module, reduction: Any, found: Attribution, args: Any, kwargs: Any) -> dict[Beside, str]:
    """By where they are, why losses that the model returns are not made as is told; empty of one that is.

    One of which that cannot be seen is missing. Of several, each may be divided by the number of samples where they are
    added up, so that it is not said whether one is a sum or a mean.

    Args:
        model: the model, which is run in eval mode: with dropout, each part would have another loss.
        reduction: ``"mean"``, ``"sum"`` or a function, as told.
        found: where the samples are in the arguments; what it found to couple samples is looked at, too.
    """
    count = None if found.grouping is not None else found.count((args, kwargs))
    returned = not found.outputs or None in found.outputs
    if count is None or count < 2 or found.coupled or not (returned or found.coupling):
        return {}
    ids = torch.randperm(count, generator=fresh_generator(), device="cpu")[:SAMPLES]
    first = PART if len(ids) > PART + 1 else 1
    # Parts that happen to have about the same loss tell nothing: two divisions are asked.
    parts = [part for order in (ids, ids.roll(first)) for part in order.split([first, len(ids) - first])]
    take = partial(_samples, found, count, (args, kwargs))
    drawn, cuda = False, cuda_devices(model)

    def run(copied: Any) -> dict[Beside, float]:
        nonlocal drawn
        before = get_random_state(cuda)
        losses = _losses(model, model(*copied[0], **copied[1]), found.coupling)
        drawn = drawn or not same_random_state(before, get_random_state(cuda))
        return losses

    def holds(kind: Any, losses: Sequence[float], tolerance: float) -> bool:
        told = [_share(kind, take, ids, some) * loss for some, loss in zip(parts, losses[1:], strict=True)]
        return all(_near([losses[0], *losses[i : i + 2]], sum(told[i - 1 : i + 1]), tolerance) for i in (1, 3))

    try:
        with isolate(model, None, []) as isolated, evaluating(model):
            runs = [isolated.run(run, take(some)) for some in (ids, *parts)]
            if drawn:
                return {}
            by_place = {place: [own[place] for own in runs] for place in runs[0]}
            bounds = dict.fromkeys(by_place, _rounding(model, UNITS))
            if any(not holds(reduction, losses, bounds[p]) for p, losses in by_place.items()):
                twice = isolated.run(run, take(ids.repeat(2)))
                bounds = {p: _measured(model, losses[0], twice[p]) for p, losses in by_place.items()}
            reasons = {p: "" for p, losses in by_place.items() if holds(reduction, losses, bounds[p])}
            others = {
                p: x for p, x in by_place.items() if p not in reasons and not all(_near(x, y, bounds[p]) for y in x)
            }
            # The order matters where a generator is in the loss.
            for order in (ids.flip(0), ids.roll(1), ids.roll(2)) if others else ():
                again = isolated.run(run, take(order))
                others = {p: losses for p, losses in others.items() if _near(losses, again[p], bounds[p])}
            several = sum(place.module is None for place in by_place) > 1
            for place, losses in others.items():
                summed, mean = (holds(kind, losses, bounds[place]) for kind in ("sum", "mean"))
                divided = summed and _has_numbers(args, kwargs)
                if not (summed or mean) or (divided and reduction == "mean" and _by_tokens(args, kwargs, count)):
                    reasons[place] = _WEIGHTED
                elif not several and not divided:
                    reasons[place] = _SUM if summed else _MEAN
            return reasons
    except Exception:  # such as of a batch that the model does not accept, or that has no such loss
        return {}


def _near(losses: Sequence[float], other: float, tolerance: float) -> bool:
    """Whether the first of some losses is another number, to a part of the size of all."""
    return abs(other - losses[0]) <= tolerance * sum(map(abs, losses))


def _measured(model: nn.Module, loss: float, twice: float) -> float:
    """What may be rounding, by the loss of the same samples, each of them twice: the same one, or twice that."""
    moved = min(abs(twice - loss), abs(twice - 2 * loss)) / abs(loss) if loss else 0.0
    return min(_rounding(model, UNITS) + MEASURED * moved, _rounding(model))


def watch_losses(attachment: "Attachment", record: ForwardRecord, output: Any) -> None:
    """Mark layers once a backward begins at a loss of which it is found that it is not to be told of.

    Args:
        record: of the forward that has ended, with what was found of what the model makes beside outputs of samples.
    """
    fisher, found = attachment.fisher, record.attribution
    watch_scale(fisher, record, output)

    def begins(reason: str, gradient: Tensor) -> None:
        if not inside_transform() and bool((gradient != 0).any()):
            fisher.troubles.guarded(None, (), fisher.troubles.mark, list(fisher.sums), reason)

    if found.unreduced:
        for place, tensor in made_beside(None, output).items():
            if place in found.unreduced and not tensor.dim():
                tensor.register_hook(partial(begins, found.unreduced[place]))
    if found.coupling:
        watch_beside(fisher, output, found.coupling)
    if record.scheduled and fisher.ranks is None:
        watch_coupling(attachment, record, output)


def _samples(found: Attribution, count: int, arguments: Any, ids: Tensor) -> Any:
    """The arguments of some samples."""
    dims = iter(found.dims)

    def taken(tensor: Tensor) -> Tensor:
        dim = next(dims)
        shared = dim is None or tensor.shape[dim] != count
        return tensor if shared else tensor.index_select(dim or 0, ids.to(tensor.device))

    return map_tensors(taken, arguments)


def _losses(model: nn.Module, output: Any, kept: Collection[Beside]) -> dict[Beside, float]:
    """The losses that a model returns, or keeps in some places, as far as they are finite."""
    made = made_beside(model, output)
    losses = {
        place: float(t.detach()) for place, t in made.items() if not t.dim() and (place.module is None or place in kept)
    }
    return {place: loss for place, loss in losses.items() if isfinite(loss)}


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


def _rounding(model: nn.Module, units: int | None = None) -> float:
    """That of the least precise of the model's parameters, or of float32, in which models take losses.

    Args:
        units: in the last place; None for all that passes for rounding.
    """
    kinds = {torch.float32, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    passes = max(map(rounding, kinds))
    return passes if units is None else min(units * max(torch.finfo(kind).eps for kind in kinds), passes)


def _by_tokens(args: Any, kwargs: Any, count: int) -> bool:
    """Whether labels, and a number of tokens that the loss is divided by, give samples other weights than a mean does.

    As Hugging Face's ``Trainer`` passes them to a model, of this batch or of several whose gradients are accumulated.
    """
    if kwargs.get("num_items_in_batch") is None:
        return False
    try:  # a causal language model's loss leaves out the first label
        told = [weights_of(token_weights(shift=shift), args, kwargs, count) for shift in (0, 1)]
    except InvalidArgumentError:
        return False
    return not any(c is not None and torch.allclose(count * c, torch.ones_like(c), rtol=1e-3) for c in told)


def _has_numbers(args: Any, kwargs: Any) -> bool:
    """Whether the model is called with a number, such as one of tokens, which its loss may be divided by."""
    return any(
        (isinstance(x, (int, float)) and not isinstance(x, bool)) or (isinstance(x, Tensor) and not x.dim())
        for x in (*args, *kwargs.values())
    )
