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

from ..._torch.modules import evaluating
from ..._torch.pytree import map_tensors
from ..._torch.random_state import cuda_devices, fresh_generator, get_random_state, same_random_state
from ..._torch.transforms import inside_transform
from ...errors import InvalidArgumentError
from ...layers.dtypes import rounding
from ...oneshot.isolation import isolate
from ..attribution import Attribution
from ..record import ForwardRecord
from .beside import Beside, made_beside, watch_beside
from .coupling import watch_coupling
from .reduction import token_weights, weights_of
from .scale import watch_scale

if TYPE_CHECKING:
    from ..hooks import Attachment

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
    take = partial(_samples, found, count, (args, kwargs))
    cuda = cuda_devices(model)

    def run(arguments: Any) -> tuple[dict[Beside, float], bool]:
        before = get_random_state(cuda)
        losses = _losses(model, model(*arguments[0], **arguments[1]), found.coupling)
        return losses, not same_random_state(before, get_random_state(cuda))

    try:
        with isolate(model, None, []) as isolated, evaluating(model):
            return _reasons(
                reduction,
                lambda some: isolated.run(run, take(some)),
                take,
                ids,
                (_rounding(model, UNITS), _rounding(model)),
                divided=_has_numbers(args, kwargs),
                by_tokens=_by_tokens(args, kwargs, count),
            )
    except Exception:  # such as of a batch that the model does not accept, or that has no such loss
        return {}


def _reasons(
    reduction: Any,
    run: Callable[[Tensor], tuple[dict[Beside, float], bool]],
    take: Callable[[Tensor], Any],
    ids: Tensor,
    bounds: tuple[float, float],
    *,
    divided: bool,
    by_tokens: bool,
) -> dict[Beside, str]:
    """:func:`told_otherwise`, of some samples.

    Args:
        run: the model on some samples: its losses, and whether it drew random numbers.
        take: the model's arguments for some samples.
        ids: the samples.
        bounds: what is rounding for certain, and all that passes for it, as parts of the size of losses.
        divided: whether the loss may be divided by a number that the model is called with.
        by_tokens: whether that is one of tokens, of which samples have other shares than in a mean over samples.
    """
    parts = _two_divisions(ids)
    runs = [run(some) for some in (ids, *parts)]
    if any(drew for _, drew in runs):
        return {}
    by_place = {place: [losses[place] for losses, _ in runs] for place in runs[0][0]}

    rtol = dict.fromkeys(by_place, bounds[0])

    def holds(kind: Any, place: Beside) -> bool:
        losses = by_place[place]
        shared = [_share(kind, take, ids, some) * loss for some, loss in zip(parts, losses[1:], strict=True)]
        return all(_near([losses[0], *losses[i : i + 2]], sum(shared[i - 1 : i + 1]), rtol[place]) for i in (1, 3))

    if not all(holds(reduction, place) for place in by_place):
        twice, _ = run(ids.repeat(2))
        rtol = {place: _measured(losses[0], twice[place], *bounds) for place, losses in by_place.items()}
    as_told = {place for place in by_place if holds(reduction, place)}
    others = {p: x for p, x in by_place.items() if p not in as_told and not all(_near(x, y, rtol[p]) for y in x)}
    # The order matters where a generator is in the loss.
    for order in (ids.flip(0), ids.roll(1), ids.roll(2)) if others else ():
        again, _ = run(order)
        others = {place: losses for place, losses in others.items() if _near(losses, again[place], rtol[place])}
    several = sum(place.module is None for place in by_place) > 1
    reasons = dict.fromkeys(as_told, "")
    for place in others:
        summed, mean = holds("sum", place), holds("mean", place)
        if not (summed or mean) or (summed and reduction == "mean" and by_tokens):
            reasons[place] = _WEIGHTED
        elif not several and not (summed and divided):
            reasons[place] = _SUM if summed else _MEAN
    return reasons


def _two_divisions(ids: Tensor) -> list[Tensor]:
    """Two divisions of the samples in two parts: parts that happen to have about the same loss tell nothing."""
    first = PART if len(ids) > PART + 1 else 1
    return [part for order in (ids, ids.roll(first)) for part in order.split([first, len(ids) - first])]


def _near(losses: Sequence[float], other: float, rtol: float) -> bool:
    """Whether the first of some losses is another number, to rounding."""
    return abs(other - losses[0]) <= rtol * sum(map(abs, losses))


def _measured(loss: float, twice: float, certain: float, passes: float) -> float:
    """What may be rounding, by the loss of the same samples, each of them twice: the same one, or twice that."""
    moved = min(abs(twice - loss), abs(twice - 2 * loss)) / abs(loss) if loss else 0.0
    return min(certain + MEASURED * moved, passes)


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
