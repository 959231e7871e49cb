"""Are samples independent of one another in the model?

While some samples are replaced by others, the rest must keep their output. The sets of replaced samples are chosen so
that for every ordered pair of samples some set holds the second and not the first: an influence of one sample on
another shows unless it is below rounding for the very replacement.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, islice
from math import comb
from typing import Any

import torch
from torch import Tensor

from .._torch.failures import is_missing_graph
from .._torch.pytree import map_tensors, tensors_in
from .._torch.vjp import chunks, default_chunk_size, stacked_vjp
from ..batch import sample_dimension
from ..layers.dtypes import MOST_ROUNDING, rounding
from ..layers.layout import DIM_ZERO, Layout
from .isolation import IsolatedModel

#: How often samples are weighted by random powers of two.
DRAWS = 3


def separating_masks(count: int) -> Tensor:
    """Masks (B, N), B about log₂ N: for every ordered pair (n, m) some mask holds m and not n.

    Each sample gets a different word of B bits with exactly ⌊B/2⌋ ones, so that no word covers another (Sperner).
    """
    if count == 1:
        return torch.zeros(0, 1, dtype=torch.bool, device="cpu")
    bits = next(b for b in range(2, count + 2) if comb(b, b // 2) >= count)
    masks = torch.zeros(bits, count, dtype=torch.bool, device="cpu")
    for sample, word in enumerate(islice(combinations(range(bits), bits // 2), count)):
        masks[list(word), sample] = True
    return masks


def outputs_independent(
    isolated: IsolatedModel,
    inputs: Any,
    count: int,
    sample_dim: int,
    forward: Callable[[Any], Any] | None = None,
    output: Any = None,
) -> bool:
    """Whether every sample's output stays as it is while others are replaced by their neighbours in the batch.

    Where samples that take one another's places, some of them twice and others not at all, all keep the outputs that
    they had, the one forward tells. Where they do not (of dropout, each place has its own), are too much alike, or may
    not stand in another order (sorted by length), there are more. What all samples decide together may stay as it is in
    all of these: see :func:`secorder.oneshot.together.alone_as_together`.
    """
    run = forward or isolated.forward
    before = without_gradients(run, inputs) if output is None else output
    base = [t.detach() if output is not None else t.detach().clone() for t in tensors_in(before)]
    if count > 2 and _places_exchanged(run, inputs, base, count, sample_dim):
        return True
    in_order = False

    def replaced(mask: Tensor) -> Any:
        return map_tensors(partial(with_neighbours, mask, count, sample_dim, in_order=in_order), inputs)

    for mask in separating_masks(count):
        try:
            found = without_gradients(run, replaced(mask))
        except Exception:  # of the model: samples may not stand in any order
            if in_order:
                raise
            in_order = True
            found = without_gradients(run, replaced(mask))
        for before, after, dim in placed(base, found, count, sample_dim):
            kept = ~mask.to(before.device)
            if bool(changed_entries(before, after).movedim(dim, 0)[kept].any()):
                return False
    return True


def placed(base: Sequence[Tensor], found: Any, count: int, sample_dim: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of output tensors that hold numbers of samples what they were, what they are, and the samples' dimension."""
    for before, after in zip(base, tensors_in(found), strict=True):
        dim = sample_dimension(before, count, sample_dim)
        if dim is not None and (before.is_floating_point() or before.is_complex()):
            yield before, after.detach(), dim


def exchange(inputs: Any, count: int, sample_dim: int) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """For each place another sample, some twice and others nowhere, and what puts them there; None if all are alike.

    Nowhere are those with the largest numbers, by which what scales a batch (a quantisation, say) goes.
    """
    tensors = [(t, sample_dimension(t, count, sample_dim)) for t in tensors_in(inputs)]
    order = _resampled(count, [_holder(t, dim) for t, dim in tensors if dim is not None and _of_numbers(t)])
    if not all(dim is None or _differ(t, dim, order) for t, dim in tensors):
        return None

    def exchanged(tensor: Tensor) -> Tensor:
        dim = sample_dimension(tensor, count, sample_dim)
        return tensor if dim is None else tensor.index_select(dim, order.to(tensor.device))

    return order, exchanged


def _places_exchanged(
    run: Callable[[Any], Any], inputs: Any, base: Sequence[Tensor], count: int, sample_dim: int
) -> bool:
    """Whether samples in others' places, some of them twice and others not at all, have the outputs that they had."""
    others = exchange(inputs, count, sample_dim)
    if others is None:
        return False
    order, exchanged = others
    try:
        found = without_gradients(run, map_tensors(exchanged, inputs))
    except Exception:  # of the model: of what must be in order
        return False
    for before, after, dim in placed(base, found, count, sample_dim):
        expected = before.index_select(dim, order.to(before.device))
        if expected.shape != after.shape or bool(changed_entries(expected, after).any()):
            return False
    return True


def _resampled(count: int, nowhere: Sequence[int] = ()) -> Tensor:
    """For each place another sample; a third of the samples, some given ones first, is in none, and as many in two."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    places = torch.arange(count, device="cpu")
    following = places.roll(-1)
    # Every third one of the ring gets the sample two places on, which its successor has too.
    following[::3] = places.roll(-2)[::3]
    left = set(range(count)) - set(following.tolist())
    ring = torch.randperm(count, generator=generator, device="cpu").tolist()
    for place, sample in zip(sorted(left), dict.fromkeys(nowhere), strict=False):
        other = ring.index(sample)
        ring[place], ring[other] = ring[other], ring[place]
    order = torch.empty_like(places)
    order[ring] = torch.tensor(ring, device="cpu")[following]
    return order


def _of_numbers(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers one by one, real or complex."""
    real = tensor.is_floating_point() or tensor.is_complex()
    return real and tensor.numel() > 0 and tensor.layout == torch.strided


def _holder(tensor: Tensor, dim: int) -> int:
    """The sample that holds the largest number."""
    return int(tensor.detach().abs().movedim(dim, 0).reshape(tensor.shape[dim], -1).amax(1).argmax())


def _differ(tensor: Tensor, dim: int, order: Tensor) -> bool:
    """Whether exchanging samples changes those of most places by much, as far as they are real numbers."""
    if not _of_numbers(tensor):
        return not (tensor.is_floating_point() or tensor.is_complex())
    changed = (tensor - tensor.index_select(dim, order.to(tensor.device))).abs().movedim(dim, 0)
    change = changed.reshape(len(changed), -1).amax(1)
    return bool((change > tensor.abs().amax() / 64).float().mean() >= 0.5)


def without_gradients(run: Callable[[Any], Any], inputs: Any) -> Any:
    """``run(inputs)`` without a graph, unless the model needs one to differentiate itself."""
    try:
        with torch.no_grad():
            return run(inputs)
    except RuntimeError as error:
        if not is_missing_graph(error):
            raise
    return run(inputs)


def changed_entries(before: Tensor, after: Tensor) -> Tensor:
    """Which entries differ by more than rounding; infinite ones (masked logits) may stay so."""
    if before.is_complex():
        return changed_entries(torch.view_as_real(before.resolve_conj()), torch.view_as_real(after.resolve_conj())).any(
            -1
        )
    near = (before - after).abs() <= rounding_in(before)
    return ~((before == after) | near | (before.isnan() & after.isnan()))


def changed_samples(before: Tensor, after: Tensor, layouts: Sequence[Layout], bound: Tensor) -> list[Tensor]:
    """By layout, which samples hold an entry of :func:`changed_entries`: bool, shape ``(N,)`` each.

    The bound is :func:`rounding_in` ``before``, which is the same for many ``after``.
    """
    if not before.is_complex():
        difference = (before - after).abs_()
        largest = [_largest(layout.split(difference)) for layout in layouts]
        if not any(bool(by_sample.isnan().any()) for by_sample in largest):  # as of what is infinite in both
            return [by_sample > bound for by_sample in largest]
    changed = changed_entries(before, after)
    return [_largest(layout.split(changed)) for layout in layouts]


def rounding_in(before: Tensor) -> Tensor:
    """What passes for rounding in the entries of a tensor: a part of the largest finite one."""
    if not before.numel():
        return before.new_zeros((), dtype=before.dtype.to_real())
    largest = before.abs().amax()
    if not bool(largest.isfinite()):
        finite = before[before.isfinite()].abs()
        largest = finite.amax() if finite.numel() else torch.zeros_like(largest)
    return rounding(before.dtype) * largest


def _largest(by_sample: Tensor) -> Tensor:
    """The largest entry of each sample's, shape ``(N,)``."""
    behind = tuple(range(1, by_sample.dim()))
    if not by_sample.numel():
        return by_sample.new_zeros(len(by_sample))
    return by_sample.amax(behind) if behind else by_sample


def with_neighbours(mask: Tensor, count: int, sample_dim: int, tensor: Tensor, *, in_order: bool = False) -> Tensor:
    """Samples of a mask replaced by their neighbours, a little scaled: samples that are all alike must change too.

    With ``in_order`` by the nearest ones that are kept, before them where there are any: then what is sorted stays so.
    """
    dim = sample_dimension(tensor, count, sample_dim)
    if dim is None:
        return tensor
    if tensor.layout != torch.strided:
        dense = with_neighbours(mask, count, sample_dim, tensor.to_dense(), in_order=in_order)
        return dense.to_sparse(layout=tensor.layout)
    here = mask.to(tensor.device).view(*(-1 if d == dim else 1 for d in range(tensor.dim())))
    if in_order:
        kept = torch.arange(count, device=mask.device).masked_fill(mask, -1).cummax(0).values
        first = int((~mask).byte().argmax())
        other = tensor.index_select(dim, kept.clamp(min=first).to(tensor.device))
    else:
        other = tensor.roll(1, dim)
    return torch.where(
        here, other if not (tensor.is_floating_point() or tensor.is_complex()) else other * 1.03125, tensor
    )


def over_samples(values: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """Values (K, N) of samples, spread over tensors of a layout: shape ``(K, *like.shape)``."""
    split = layout.split(like.detach())
    stacked = values.view(*values.shape, *(1,) * (split.dim() - 1)).expand(-1, *split.shape)
    return stacked if layout == DIM_ZERO else torch.stack([layout.join(v) for v in stacked])


def rows_weighted(
    plain: Tensor,
    weighted: Tensor,
    weights: Tensor,
    layout: Layout,
    *,
    kind: torch.dtype | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Of each of K stacked gradients, whether weighting the samples has weighted their rows, to rounding: ``(K,)``.

    That of their dtype, or of a given ``kind``, relative to each sample's largest entry; or ``noise`` where it was
    measured, of which no more than what passes for rounding at most: rows of other samples would pass too.
    """
    inner = layout._replace(dim=layout.dim + 1)

    def split(stacked: Tensor) -> Tensor:
        by_sample = inner.split(stacked.detach()).movedim(1 if layout.rows == 1 else 2, 0)
        return by_sample.reshape(*by_sample.shape[:2], -1)

    if not plain.numel():
        return plain.new_ones(len(plain), dtype=torch.bool)
    before, after = split(plain), split(weighted)
    expected = before * weights.to(before)[:, None]
    largest = expected.abs().amax(2, keepdim=True)
    bound = rounding(kind or plain.dtype) * largest
    if noise is not None:
        bound = bound.maximum(noise.minimum(MOST_ROUNDING * largest))
    return ((after - expected).abs() <= bound).flatten(1).all(1)


def sample_weights(count: int, generator: torch.Generator, *, powers: bool = False) -> Tensor:
    """Random weights of the samples, shape ``(N,)``, from 0.5 to 2: of few samples far apart, to any rounding.

    Or ``powers`` of two, from 1/4 to 32, of which several draws tell samples apart: these leave rounding as it is,
    however few digits there are, so that rows of one sample are weighted exactly, and those of others are far off.
    """
    place = generator.device
    order = torch.randperm(count, generator=generator, device=place)
    if powers:
        return 2.0 ** (order % 8 - 2).double()
    beside = torch.rand(count, generator=generator, dtype=torch.float64, device=place)
    return 0.5 + 1.5 * (order + beside / 2) / count


def weight_draws(tensors: Sequence[Tensor]) -> int:
    """How often to check with random weights: once; in half precision by powers of two, of which some are the same."""
    return DRAWS if any(torch.finfo(t.dtype).bits < 32 for t in tensors) else 1


def sample_bits(count: int, device: torch.device | None = None) -> Tensor:
    """Masks (B, N) of the samples whose index has bit b set: any two samples differ in at least one of them."""
    index = torch.arange(count, device=device)
    return torch.stack([(index >> b) & 1 for b in range((count - 1).bit_length())] or [index]).bool()


def block_diagonal(
    output_gradients: Sequence[Tensor | None],
    points: Sequence[Tensor],
    generator: torch.Generator,
    layouts: Sequence[Layout] | None = None,
) -> bool:
    """Whether a Hessian is block diagonal over samples, by default in dim 0: exactly zero between any two of them.

    For each bit of the sample index, a random v on the samples with that bit is multiplied by the Hessian; the other
    samples' rows must be exactly zero. Two samples differ in a bit, so a coupled pair escapes only where the product
    with a random v vanishes: with probability zero in exact arithmetic, or by underflow.
    """
    layouts = layouts or [DIM_ZERO] * len(points)
    count = layouts[0].size(points[0])
    if count == 1:
        return True
    bits = sample_bits(count, points[0].device)
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    for ids in chunks(len(bits), default_chunk_size(sum(x.numel() for x in points), points[0], None)):
        own = torch.Generator(generator.device).manual_seed(seed)
        masks = [over_samples(bits[ids.start : ids.stop], x, layout) for x, layout in zip(points, layouts, strict=True)]
        vectors = [
            torch.randn(x.shape, generator=own, dtype=x.dtype, device=own.device).to(x.device) * mask
            for x, mask in zip(points, masks, strict=True)
        ]
        products = stacked_vjp(output_gradients, points, vectors)
        if any(bool((u != 0).logical_and_(~mask).any()) for u, mask in zip(products, masks, strict=True)):
            return False
        del vectors, products  # as large as the outputs
    return True


def linear_products(
    output_gradients: Sequence[Tensor | None],
    points: Sequence[Tensor],
    generator: torch.Generator,
    *,
    together: bool = False,
) -> bool:
    """Whether products with a Hessian are linear in the vector, to rounding.

    They are, unless the backward pass of some operation is not, such as that of a hook that clamps gradients. To a 64th
    of the largest entry in all points ``together`` where one's may all be rounding, as those of a bias that a
    normalisation takes off again, and rounding may add up.
    """

    def random(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)

    pairs = [(random(x), random(x)) for x in points]
    found = stacked_vjp(output_gradients, points, [torch.stack([v, w, v + w]) for v, w in pairs])
    found = [u for u in found if u.numel()]
    sizes = [u[:2].abs().amax() for u in found]
    largest = max(sizes, default=None) if together else None
    for u, size in zip(found, sizes, strict=True):
        bound = rounding(u.dtype) * size if largest is None else largest.to(u.device) / 64
        if bool(((u[0] + u[1] - u[2]).abs() > bound).any()):
            return False
    return True
