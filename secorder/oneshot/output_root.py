"""The root of the loss's Hessian in the model's output, tensor by tensor and sample by sample."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._torch.vjp import split_like, stacked_vjp
from .output_hessian import as_samples
from .root_forms import Product, form_root, softmax_root
from .roots import Root, joined

__all__ = ["output_root"]


def output_root(gradients: Sequence[Tensor | None], points: Sequence[Tensor], chunk_size: int | None = None) -> Root:
    """A root of the loss's Hessian in the outputs: in closed form where one fits, by blocks, or by products.

    Output tensors that do not interact have roots of their own. Outputs that the loss does not depend on, or only
    linearly, have no columns.

    Args:
        gradients: of a loss that does not couple samples, with respect to ``points``, differentiable.
        points: tensors with samples in dim 0; C elements of one sample in all.
        chunk_size: products batched at most.

    Returns:
        the root, of at most C columns; at least one, so that a loss without curvature needs no case of its own.

    Example:
        >>> import torch
        >>> from secorder.oneshot.output_root import output_root
        >>> outputs = torch.randn(8, 3, requires_grad=True)
        >>> loss = torch.nn.functional.mse_loss(outputs, torch.zeros(8, 3), reduction="sum")
        >>> root = output_root(torch.autograd.grad(loss, outputs, create_graph=True), [outputs])
        >>> root.num_columns  # S Sᵀ = 2 I for each sample
        3
    """
    like = as_samples(points[0].detach())
    sizes = [as_samples(x).shape[1] for x in points]
    ids = torch.arange(sum(sizes), device=like.device).split(sizes)
    parts = [
        _of_group(gradients, points, ids, group, active, chunk_size) for group, active in _groups(gradients, points)
    ]
    if not parts:
        nothing = like.new_zeros(len(like), sum(sizes))
        return Root(lambda xi: xi * nothing, 1, like, None, None, nothing, torch.full_like(nothing[0], -1).long())
    if len(parts) == 1 and len(parts[0][1]) == sum(sizes):
        return parts[0][0]
    return joined(parts, like, sum(sizes))


def _groups(gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Output tensors that interact, and which of their elements have curvature, in the shapes of one sample."""
    reach, active = _reached(gradients, points)
    groups: list[set[int]] = []
    for members in reach.values():
        merged = members.union(*(g for g in groups if g & members))
        groups = [g for g in groups if not g & members] + [merged]
    for group in groups:
        order = sorted(group)
        yield order, [active[i] for i in order]


def _reached(
    gradients: Sequence[Tensor | None], points: Sequence[Tensor]
) -> tuple[dict[int, set[int]], dict[int, Tensor]]:
    """Which output tensors each one interacts with, and which of their elements have curvature."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    live = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad and points[i].numel()]
    reach: dict[int, set[int]] = {}
    active = {i: torch.zeros(points[i].shape[1:], dtype=torch.bool, device=points[i].device) for i in live}
    for _ in range(2):  # of millions of entries, one may come out as zero by chance
        for i in live:
            vector = torch.randn(points[i].shape, generator=generator, dtype=torch.float32, device="cpu")
            found = stacked_vjp([gradients[i]], [points[j] for j in live], [vector.to(points[i])[None]])
            for j, product in zip(live, found, strict=True):
                some = (product[0] != 0).any(0)
                active[j] |= some
                if bool(some.any()):
                    reach.setdefault(i, {i}).add(j)
        if all(bool(some.all()) for some in active.values()):
            break
    return reach, active


def _of_group(
    gradients: Sequence[Tensor | None],
    points: Sequence[Tensor],
    ids: Sequence[Tensor],
    group: Sequence[int],
    active: Sequence[Tensor],
    chunk_size: int | None,
) -> tuple[Root, Tensor]:
    """The root in output tensors that interact, and which outputs of all it is of."""
    inside, own = [points[i] for i in group], [gradients[i] for i in group]
    sizes = [as_samples(x).shape[1] for x in inside]
    every = ids[group[0]] if len(group) == 1 else torch.cat([ids[i] for i in group])

    def product_of(where: Tensor) -> Product:
        whole = len(where) == len(every)
        here = where if whole else torch.searchsorted(every, where)  # among the group's own

        def product(vectors: Tensor) -> Tensor:
            if not whole:
                vectors = vectors.new_zeros(*vectors.shape[:2], sum(sizes)).index_copy_(2, here, vectors)
            products = stacked_vjp(own, inside, split_like(vectors, inside))
            found = [u.reshape(len(u), len(x), -1) for u, x in zip(products, inside, strict=True)]
            together = (found[0] if len(found) == 1 else torch.cat(found, 2)).detach()
            return together if whole else together[..., here]

        return product

    if len(group) > 1:
        some = torch.cat([a.flatten() for a in active])
        f = torch.cat([as_samples(x.detach()) for x in inside], 1)[:, some]
        alike = len({x.shape for x in inside}) == 1 and f.shape[1] == sum(sizes)
        return form_root(product_of(every[some]), f, len(group) if alike else 1, chunk_size), every[some]
    shape = inside[0].shape[1:] or (1,)  # one number a sample has a dimension of its own here
    own_ids, f, some = every.view(shape), inside[0].detach().reshape(-1, *shape), active[0].view(shape)
    for d in range(some.dim()):  # of a sure class, all rounds to zero: it belongs to the softmax nevertheless
        wider = some.any(d, keepdim=True).expand_as(some)
        if not torch.equal(wider, some):
            where, part = _box(own_ids, f, wider)
            root = softmax_root(product_of(where), part, d + 1)
            if root is not None:
                return root, where
    where, f = _box(own_ids, f, some)
    return form_root(product_of(where), f, 1, chunk_size), where


def _box(ids: Tensor, f: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest part of an output tensor, cut dimension by dimension, that holds all elements with curvature."""
    for d in range(active.dim()):
        some = active.movedim(d, 0).flatten(1).any(1) if active.dim() > 1 else active
        if not bool(some.all()):
            index = some.nonzero()[:, 0]
            ids, f = ids.index_select(d, index), f.index_select(d + 1, index)
    return ids.flatten(), f
