"""Is the loss that a model returns made of its samples' losses as is told? Seen on a few samples of a batch.

Of L = Σ_n c_n ℓ_n, with the same ℓ_n in any batch that holds sample n, two parts of a batch tell the whole: each part's
loss times what its weights are multiplied by in the whole. A loss that weights its samples by labels which the model
gets, and not as is told, does not add up so.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._torch.graph import least_precise
from ..._torch.modules import evaluating
from ..._torch.pytree import map_tensors
from ..._torch.random_state import cuda_devices, fresh_generator, get_random_state, same_random_state
from ...errors import InvalidArgumentError
from ...layers.dtypes import rounding
from ...oneshot.isolation import isolate
from ..samples.attribution import Attribution
from ..samples.beside import Beside, made_beside
from .reduction import token_weights, weights_of

#: So many samples are looked at, at most, and so many of them are one of the parts: an odd number, of which no weights
#: of two classes that are equally frequent make the part's mean that of the whole.
SAMPLES, PART = 8, 3

#: What is rounding of a loss for certain, in units in the last place; and how many times that of the same samples, each
#: of them twice, may be met elsewhere. Losses of an untrained model are nearly alike, whatever weighs its samples.
UNITS, MEASURED = 32, 64.0

#: Losses by where they are, and the least precise dtype that they were computed in; and of the model on some samples,
#: whether it drew random numbers, too.
Losses = tuple[dict[Beside, float], torch.dtype]
Run = Callable[[Tensor], tuple[Losses, bool]]

_WEIGHTED = (
    "the loss that the model returns is neither the mean nor the sum of its samples' losses (padding, class weights, "
    "a statistic of the batch), or not weighted as reduction= specifies: pass reduction= with a function of the "
    "model's arguments that returns the weights c_n of L = Σ_n c_n ℓ_n, such as secorder.token_weights."
)
_SUM = 'the loss that the model returns is the sum of its samples\' losses: pass reduction="sum".'
_MEAN = 'the loss that the model returns is the mean of its samples\' losses: pass reduction="mean".'


def not_as_specified(model: nn.Module, reduction: Any, found: Attribution, args: Any, kwargs: Any) -> dict[Beside, str]:
    """By where they are, why losses that the model returns are not made as is specified; empty of one that is.

    One of which that cannot be seen is missing. Of several, each may be divided by the number of samples where they are
    added up, so that it is not said whether one is a sum or a mean. The model runs in eval mode: with dropout, each
    part would have another loss.
    """
    count = None if found.grouping is not None else found.count((args, kwargs))
    returned = not found.outputs or None in found.outputs
    if count is None or count < 2 or found.coupled or not (returned or found.coupling):
        return {}
    ids = torch.randperm(count, generator=fresh_generator(), device="cpu")[:SAMPLES]
    take = partial(_samples, found, count, (args, kwargs))
    cuda = cuda_devices(model)

    def run(arguments: Any) -> tuple[Losses, bool]:
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
                divided=_has_numbers(args, kwargs),
                by_tokens=_by_tokens(args, kwargs, count),
            )
    except Exception:  # such as of a batch that the model does not accept, or that has no such loss
        return {}


class _Losses(NamedTuple):
    """What the loss in one place is of some samples."""

    whole: float  #: of all of them together
    parts: Sequence[float]  #: of two divisions in two parts, one after the other
    rtol: float  #: what passes for rounding, as a part of the size of losses

    def add_up(self, shares: Sequence[float]) -> bool:
        """Whether the parts make the whole, each multiplied by its share, in both divisions."""
        pairs = [(self.parts[i : i + 2], shares[i : i + 2]) for i in (0, 2)]
        return all(self.is_near(sum(x * share for x, share in zip(*pair, strict=True)), pair[0]) for pair in pairs)

    def is_near(self, other: float, besides: Sequence[float] = ()) -> bool:
        """Whether the whole is another number, to the rounding of it and of others."""
        return abs(other - self.whole) <= self.rtol * sum(map(abs, [self.whole, *besides]))

    def measured(self, twice: float, certain: float, passes: float) -> "_Losses":
        """With what may be rounding by the loss of the same samples, each twice: the same one, or twice that."""
        moved = min(abs(twice - self.whole), abs(twice - 2 * self.whole)) / abs(self.whole) if self.whole else 0.0
        return self._replace(rtol=min(certain + MEASURED * moved, passes))


def _reasons(
    reduction: Any, run: Run, take: Callable[[Tensor], tuple[Any, Any]], ids: Tensor, *, divided: bool, by_tokens: bool
) -> dict[Beside, str]:
    """:func:`not_as_specified`, of some samples, for which ``take`` gives the model's arguments.

    Args:
        divided: whether the loss may be divided by a number that the model is called with.
        by_tokens: whether that is one of tokens, of which samples have other shares than in a mean over samples.
    """
    parts = _two_divisions(ids)
    told, summed, mean = (_shares(kind, take, ids, parts) for kind in (reduction, "sum", "mean"))
    seen = _seen(run, ids, parts, told)
    reasons = {place: "" for place, losses in seen.items() if losses.add_up(told)}
    others = _of_samples({place: losses for place, losses in seen.items() if place not in reasons}, run, ids)
    several = sum(place.module is None for place in seen) > 1
    for place, losses in others.items():
        is_sum, is_mean = losses.add_up(summed), losses.add_up(mean)
        if not (is_sum or is_mean) or (is_sum and reduction == "mean" and by_tokens):
            reasons[place] = _WEIGHTED
        elif not several and not (is_sum and divided):
            reasons[place] = _SUM if is_sum else _MEAN
    return reasons


def _seen(run: Run, ids: Tensor, parts: Sequence[Tensor], told: Sequence[float]) -> dict[Beside, _Losses]:
    """The losses of samples and of their parts, by where they are; none where any of them drew random numbers."""
    ((whole, kind), *of_parts), drew = zip(*(run(some) for some in (ids, *parts)), strict=True)
    if any(drew):
        return {}
    passes = rounding(kind)
    certain = min(UNITS * torch.finfo(kind).eps, passes)
    seen = {x: _Losses(loss, [losses[x] for losses, _ in of_parts], certain) for x, loss in whole.items()}
    if all(losses.add_up(told) for losses in seen.values()):
        return seen
    (twice, _), _ = run(ids.repeat(2))
    return {place: losses.measured(twice[place], certain, passes) for place, losses in seen.items()}


def _of_samples(seen: dict[Beside, _Losses], run: Run, ids: Tensor) -> dict[Beside, _Losses]:
    """The losses that are others for other samples, and the same in any order: that matters to a generator in one."""
    found = {p: x for p, x in seen.items() if not all(x.is_near(part, x.parts) for part in x.parts)}
    for order in (ids.flip(0), ids.roll(1), ids.roll(2)) if found else ():
        (again, _), _ = run(order)
        found = {place: losses for place, losses in found.items() if losses.is_near(again[place], losses.parts)}
    return found


def _two_divisions(ids: Tensor) -> list[Tensor]:
    """Two divisions of the samples in two parts: parts that happen to have about the same loss tell nothing."""
    first = PART if len(ids) > PART + 1 else 1
    return [part for order in (ids, ids.roll(first)) for part in order.split([first, len(ids) - first])]


def _samples(found: Attribution, count: int, arguments: Any, ids: Tensor) -> Any:
    """The arguments of some samples."""
    dims = iter(found.dims)

    def taken(tensor: Tensor) -> Tensor:
        dim = next(dims)
        shared = dim is None or tensor.shape[dim] != count
        return tensor if shared else tensor.index_select(dim or 0, ids.to(tensor.device))

    return map_tensors(taken, arguments)


def _losses(model: nn.Module, output: Any, kept: Collection[Beside]) -> Losses:
    """The losses that a model returns, or keeps in some places, as far as they are finite."""
    made = {p: t for p, t in made_beside(model, output).items() if not t.dim() and (p.module is None or p in kept)}
    losses = {place: float(t.detach()) for place, t in made.items()}
    kind = least_precise([*made.values(), torch.empty((), dtype=torch.float32)])  # in which models take losses
    return {place: loss for place, loss in losses.items() if isfinite(loss)}, kind


def _shares(kind: Any, take: Callable[[Tensor], tuple[Any, Any]], ids: Tensor, parts: Sequence[Tensor]) -> list[float]:
    """What the weights of each part's samples in their own batch are multiplied by in that of all.

    Raises ``ValueError`` where they are not in one proportion: the loss of the part then tells nothing of the whole's.
    """
    if kind == "sum":
        return [1.0 for _ in parts]
    shares = [len(some) / len(ids) for some in parts]
    whole = None if kind == "mean" else weights_of(kind, *take(ids), len(ids))
    for number, some in enumerate(parts if whole is not None else ()):
        own = weights_of(kind, *take(some), len(some))
        if whole is not None and own is not None:
            here, own = whole.cpu().double()[(ids[:, None] == some).int().argmax(0)], own.cpu().double()
            shares[number] = share = float(here.sum() / own.sum())
            if not torch.allclose(here, share * own, rtol=1e-3):
                raise ValueError(share)
    return shares


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
