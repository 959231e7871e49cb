"""The contraction that every curvature is made of.

For the per-sample gradients of two cotangents u and v::

    contract(u, v) = Σ_n (J_nᵀ u_n) ⊙ (J_nᵀ v_n)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch.onednn import multiplied_by_onednn, product_by_onednn
from .._torch.vjp import chunks
from .patches import Patches, matrix_products, whole_input
from .per_sample import CHUNK_ELEMENTS, Outer, PerSample, Rows, chunk_elements, distinct_rows, in_rows, sum_in_forms

__all__ = ["contract", "contract_sum"]

#: Elements of a parameter from which on a contraction adds to its result piece by piece, without a sum of its own.
IN_PLACE_ELEMENTS = 1 << 22

#: Elements of a parameter from which on, on a CPU, one sample's gradient is formed after the other, and of the rows
#: that are formed: each is added to the sum while it is in the cache (measured: up to 2.3 times as fast as several).
ALONE_ELEMENTS, CACHED_ELEMENTS = 1 << 15, 1 << 18

#: The same of a product that oneDNN makes, which puts its factors in an order of its own each time.
ONEDNN_ELEMENTS = 1 << 20

#: Elements of a sample's factor below which all are put in order at once: the copy of one alone is for one thread.
COPIED_ELEMENTS = 1 << 16

#: Elements behind each row of a sum that is transposed: columns of rows that are a power of two apart share few places
#: of a cache (measured on 1,024 rows: to read them takes half of the time).
BEHIND = 16

#: Of inputs that are no patches, twice as many; and elements that are formed of several samples of smaller ones at once
#: (measured from 64 to 256 rows and columns, on two threads: 1.1 to 1.5 times as fast).
TOGETHER_ELEMENTS = 1 << 19

#: Elements of per-sample gradients of one grouped convolution, measured on a CPU from 16 to 256 channels: of fewer, two
#: threads have too little to share, and of more, their memory may come anew from the operating system each time.
CONVOLUTION_ELEMENTS = 5 << 16


#: Elements of a parameter from which on, on a CPU, each sample's squares are added to the sum at once: one pass over
#: them in place of three, for a call (measured from 2,000 to 150,000 elements).
APART_ELEMENTS = 1 << 13


def contract(
    u: PerSample,
    v: PerSample | None = None,
    *,
    numel: int,
    out: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Σ_n u_n ⊙ v_n of two per-sample gradients, the one contraction of the library.

    Args:
        u: per-sample gradient J_nᵀ u_n, single or stacked over K cotangents, which are summed over as well.
        v: the same for the other cotangent and the same input factor; None means ``u`` itself (squares).
        numel: number of the parameter's elements.
        out: where given, ``out ← beta · out + alpha · result`` in place; at once, unless it has more than
            :data:`IN_PLACE_ELEMENTS`.
        beta: factor of what ``out`` held; 0 where it is to be forgotten, whatever it is.
        alpha: factor of the result.
        keep: where given, a bool on the device: whether squares count, or are zero whatever they are (nan).

    Returns:
        1-D tensor of ``numel`` elements, in the order of the flattened parameter.

    Example:
        >>> import torch
        >>> from secorder.layers.contraction import contract
        >>> from secorder.layers.per_sample import Outer
        >>> a, g = torch.randn(8, 1, 1, 3), torch.randn(8, 1, 1, 2)  # of nn.Linear(3, 2), eight samples
        >>> squares = torch.einsum("no,ni->noi", g[:, 0, 0], a[:, 0, 0]).square().sum(0)
        >>> torch.allclose(contract(Outer(a, g), numel=6), squares.flatten(), atol=1e-5)
        True
    """
    if numel == 0:  # a layer without inputs or outputs
        like = u if isinstance(u, Tensor) else u.g
        return like.new_zeros(0) if out is None else out
    if isinstance(u, Tensor):
        assert v is None or isinstance(v, Tensor)
        products = (u * (u if v is None else v)).reshape(-1, numel)
        if out is not None and keep is None and beta == 0.0 and alpha == 1.0:
            return torch.sum(products, 0, out=out)
        return added(kept(products.sum(0), keep), out, beta, alpha)
    if isinstance(u, Rows):
        assert v is None or isinstance(v, Rows)
        return _contract_rows(u, v, numel, out, beta, alpha, keep)
    assert v is None or isinstance(v, Outer)
    a, gu, gv = u.a, u.g, u.g if v is None else v.g
    positions = gu.shape[-2]
    if a is None and positions > 1:
        dense_v = gv.sum(-2) if gv is not gu else None
        return contract(gu.sum(-2), dense_v, numel=numel, out=out, beta=beta, alpha=alpha, keep=keep)
    if positions == 1:
        return contract_one_position(a, (gu * gv).squeeze(-2), numel, out, beta, alpha, keep)
    assert a is not None
    pairs_of_k = [(gu, gv)] if gu.dim() == 4 else list(zip(gu, gv, strict=True))
    if out is not None and (beta == 0.0 or numel > IN_PLACE_ELEMENTS):
        _scaled(out, beta)
        for gu_k, gv_k in pairs_of_k:
            _accumulate_products(out, a, gu_k, gv_k if gv is not gu else None, alpha, keep)
        return out
    total = gu.new_zeros(numel)
    for gu_k, gv_k in pairs_of_k:
        _accumulate_products(total, a, gu_k, gv_k if gv is not gu else None, 1.0, None)
    return added(kept(total, keep), out, beta, alpha)


def contract_one_position(
    a: Tensor | Patches | None,
    pairs: Tensor,
    numel: int,
    out: Tensor | None,
    beta: float = 1.0,
    alpha: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """:func:`contract` of layers with one position, whose per-sample gradients are products of rank one.

    Their products factorise, so that Σ_n (u_n ⊙ v_n)(a_n ⊙ a_n)ᵀ is one matrix product. The pairs u ⊙ v are (N, groups,
    width), or of K cotangents (K, N, groups, width).
    """
    if pairs.dim() == 4:
        pairs = pairs[0] if len(pairs) == 1 else pairs.sum(0)
    if a is None:
        return added(kept(pairs.sum(0).reshape(numel), keep), out, beta, alpha)
    pairs = kept(pairs, keep)
    a = whole_input(a)
    squares = (a * a).squeeze(2)
    squares = squares if keep is None else squares.nan_to_num_()  # times zero, where it does not count
    if out is None:
        total = torch.bmm(pairs.permute(1, 2, 0), squares.transpose(0, 1)).reshape(numel)
        return total if alpha == 1.0 else total * alpha
    if pairs.shape[1] == 1:
        _add_product(out.view(-1, a.shape[-1]), pairs[:, 0].t(), squares[:, 0], beta=beta, alpha=alpha)
    else:
        target = out.view(pairs.shape[1], -1, a.shape[-1])
        target.baddbmm_(pairs.permute(1, 2, 0), squares.transpose(0, 1), beta=beta, alpha=alpha)
    return out


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> None:
    """``out ← beta · out + alpha · left @ right`` in place."""
    differentiated = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if differentiated or not multiplied_by_onednn(left, out.numel() * len(right)):
        out.addmm_(left, right, beta=beta, alpha=alpha)
        return
    for r in chunks(len(out), max(1, ONEDNN_ELEMENTS // out.shape[1])):
        rows = slice(r.start, r.stop)
        added(product_by_onednn(left[rows], right), out[rows], beta, alpha)


def _accumulate_products(
    total: Tensor, a: Tensor | Patches, gu: Tensor, gv: Tensor | None, alpha: float, keep: Tensor | None
) -> None:
    """Add α Σ_n (Σ_p gu aᵀ) ⊙ (Σ_p gv aᵀ) to ``total``, forming a few samples and rows of the parameter at a time."""
    budget = chunk_elements(gu.device)
    count, groups, positions, width = gu.shape
    fan_in = a.shape[-1]
    target = total.view(groups, width, fan_in)
    # Measured from 64 to 50,000 rows: one piece is best up to 16 MB, and pieces of 4 MB for what is larger.
    rows = width if total.numel() <= 4 * budget else min(width, max(1, budget // (groups * fan_in)))
    if isinstance(a, Patches) and a.convolves_well(width):
        few = max(1, CONVOLUTION_ELEMENTS // total.numel())
        for n in chunks(count, alike(count, few - few % 2 if few > 1 else 1)):
            left = a.weight_gradients(slice(n.start, n.stop), gu)
            right = left if gv is None else a.weight_gradients(slice(n.start, n.stop), gv)
            _add_products(target, left, right, alpha, keep)
            del left, right  # before the next are formed
        return
    image = a.image if isinstance(a, Patches) else a
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gu, gv, image))
    if gu.device.type == "cpu" and keep is None and not differentiated:
        onednn = groups == 1 and multiplied_by_onednn(gu, positions * total.numel())
        if onednn or total.numel() >= ALONE_ELEMENTS * (1 if isinstance(a, Patches) else 2):
            _add_sample_by_sample(target, a, gu, gv, alpha, onednn=onednn)
            return
        budget = budget if isinstance(a, Patches) else TOGETHER_ELEMENTS
    for n in chunks(count, alike(count, max(1, budget // (groups * (rows + positions) * fan_in)))):
        _add_matrix_products(target, a, gu, gv, rows, n, alpha, keep)


def _add_sample_by_sample(
    target: Tensor, a: Tensor | Patches, gu: Tensor, gv: Tensor | None, alpha: float, *, onednn: bool
) -> None:
    """:func:`_accumulate_products`, some rows of one sample's gradient at a time, always in the same memory."""
    groups, width, fan_in = target.shape
    if onednn and isinstance(a, Tensor) and _are_turned(target, gu):
        turned = target.new_zeros(fan_in, width + BEHIND)[:, :width]
        _add_turned(turned, a, gu, gv)
        target[0].add_(turned.t(), alpha=alpha)
        return
    rows = alike(width, max(1, (ONEDNN_ELEMENTS if onednn else CACHED_ELEMENTS) // (groups * fan_in)))
    # Patches are copied out, of more samples than one step forms elsewhere: the sum stays in the cache between them.
    few = max(1, CHUNK_ELEMENTS // max(1, math.prod(a.shape[1:]))) if isinstance(a, Patches) else len(gu)
    memory = [None if onednn else target.new_empty(groups, rows, fan_in) for _ in range(1 if gv is None else 2)]
    for n in chunks(len(gu), few):
        inputs = a[n.start : n.stop]
        factors = [g[n.start : n.stop].transpose(2, 3) for g in (gu, gv) if g is not None]
        if onednn:  # of one group, whose dimension would cost each product three views
            inputs, factors = _in_order(inputs[:, 0]), [_in_order(own[:, 0]) for own in factors]
        for r in chunks(width, rows):
            here = target[0, r.start : r.stop] if onednn else target[:, r.start : r.stop]
            of_samples = zip(inputs.unbind(), *[own[..., r.start : r.stop, :].unbind() for own in factors], strict=True)
            for right, *lefts in of_samples:
                formed = [_product(left, right, own) for left, own in zip(lefts, memory, strict=True)]
                here.addcmul_(formed[0], formed[-1], value=alpha)
                del formed  # so that the next is formed in its memory


def _in_order(factors: Tensor) -> Tensor:
    """Samples' matrices, row after row: one copy, where they are small, in place of one a product."""
    return factors.contiguous() if _few(factors) else factors


def _few(factors: Tensor) -> bool:
    return factors[0].numel() < COPIED_ELEMENTS and factors.numel() <= CHUNK_ELEMENTS


def _are_turned(target: Tensor, g: Tensor) -> bool:
    """Whether products are made as their transposes: in one piece, by cotangents that need no copy.

    Where that puts fewer numbers in another order: the inputs and the sum, in place of the cotangents (measured from
    512 to 1,024 rows of 160 to 256 columns, of 8 and 16 samples: mostly a tenth faster; of 1,024 rows, on two threads).
    """
    instead = len(g) * g.shape[2] * target.shape[2] + target.numel()
    return instead < g.numel() and target.numel() <= ONEDNN_ELEMENTS and (g[0].is_contiguous() or _few(g))


def _add_turned(turned: Tensor, a: Tensor, gu: Tensor, gv: Tensor | None) -> None:
    """The same of tall matrices, as their transposes: oneDNN's products are the faster the longer their rows are."""
    factors = [_in_order(g[:, 0]).unbind() for g in (gu, gv) if g is not None]
    for left, *rights in zip(_in_order(a[:, 0].transpose(1, 2)).unbind(), *factors, strict=True):
        formed = [product_by_onednn(left, right) for right in rights]
        turned.addcmul_(formed[0], formed[-1])
        del formed


def _product(left: Tensor, right: Tensor, memory: Tensor | None) -> Tensor:
    """One sample's products, of its groups, in some memory; without any, its only one by oneDNN."""
    if memory is None:
        return product_by_onednn(left, right)
    return torch.bmm(left, right, out=memory[:, : left.shape[1]])


def alike(count: int, most: int) -> int:
    """Samples a piece, at most so many, of pieces that are about as large, and even: two threads share each."""
    size = max(1, -(-count // max(1, -(-count // most))))
    return size + 1 if size % 2 and size < most else size


def _add_matrix_products(
    target: Tensor,
    a: Tensor | Patches,
    gu: Tensor,
    gv: Tensor | None,
    rows: int,
    n: range,
    alpha: float,
    keep: Tensor | None,
) -> None:
    """:func:`_accumulate_products` of some samples, by matrix products of so many rows of the parameter."""
    # bmm on three dimensions: matmul on four copies what is not contiguous
    inputs = a[n.start : n.stop].flatten(0, 1)
    left_t = gu[n.start : n.stop].flatten(0, 1).transpose(1, 2)
    right_t = None if gv is None else gv[n.start : n.stop].flatten(0, 1).transpose(1, 2)
    for r in chunks(target.shape[1], rows):
        left = matrix_products(left_t[:, r.start : r.stop], inputs, a)
        right = left if right_t is None else matrix_products(right_t[:, r.start : r.stop], inputs, a)
        _add_products(target[:, r.start : r.stop], left, right, alpha, keep)
        del left, right  # before the next are formed


def _add_products(target: Tensor, left: Tensor, right: Tensor, alpha: float, keep: Tensor | None) -> None:
    """Add α Σ_n left_n ⊙ right_n to ``target`` (groups, …), for both of shape (N · groups, …)."""
    if keep is None and target.device.type == "cpu" and target.numel() >= APART_ELEMENTS:
        of_samples = left.view(-1, *target.shape).unbind()
        others = of_samples if right is left else right.view(-1, *target.shape).unbind()
        for one, other in zip(of_samples, others, strict=True):
            target.addcmul_(one, other, value=alpha)
    elif right is left and left.is_cuda and not left.requires_grad:
        _add_squares(target, left.unflatten(0, (-1, len(target))), alpha, keep)
    else:  # in place where it may be: ``left`` was formed for this, and another copy would double the peak of memory
        products = left * right if left.requires_grad else left.mul_(right)
        target.add_(kept(products.unflatten(0, (-1, len(target))).sum(0), keep), alpha=alpha)


def _add_squares(target: Tensor, each: Tensor, alpha: float, keep: Tensor | None) -> None:
    """Add α Σ_n each_n² to ``target`` in one pass over ``each``: few kernels, as an accelerator likes."""
    norms = kept(torch.linalg.vector_norm(each, dim=0), keep)
    target.addcmul_(norms, norms, value=alpha)


def kept(squares: Tensor, keep: Tensor | None) -> Tensor:
    """Squares, or zeros whatever they are where they are not to be kept: ``torch.where`` is seven times as slow."""
    return squares if keep is None else squares.nan_to_num_().mul_(keep)


def _contract_rows(
    u: Rows, v: Rows | None, numel: int, out: Tensor | None, beta: float, alpha: float, keep: Tensor | None
) -> Tensor:
    """:func:`contract` of :class:`Rows`, on the rows of each sample that are not zero."""
    width = u.g.shape[-1]
    places, where = distinct_rows(u)

    def compact(g: Tensor) -> Tensor:
        flat = g.flatten(-3, -2)
        return flat.new_zeros(*flat.shape[:-2], len(places), width).index_add(-2, where, flat)

    left = compact(u.g)
    products = kept(left * (left if v is None else compact(v.g)), keep)
    if products.dim() == 3:
        products = products.sum(0)
    if out is None:
        total = products.new_zeros(u.rows, width).index_add(0, places % u.rows, products)
        return total.reshape(numel) * alpha
    _scaled(out, beta)
    out.view(u.rows, width).index_add_(0, places % u.rows, products, alpha=alpha)
    return out


def contract_sum(
    parts: Sequence[PerSample],
    *,
    numel: int,
    out: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Σ_n (Σ_i u_{i, n})²: :func:`contract` for a parameter that gets its gradient from several layers.

    Args:
        parts: each layer's per-sample gradients of the parameter.
        numel: number of the parameter's elements.
        out, beta, alpha, keep: as for :func:`contract`.

    Returns:
        1-D tensor of ``numel`` elements.

    Example:
        >>> import torch
        >>> from secorder.layers.contraction import contract, contract_sum
        >>> from secorder.layers.per_sample import Outer, Rows
        >>> head = Outer(torch.randn(8, 1, 4, 3), torch.randn(8, 1, 4, 10))  # ten words, of width three, four tokens
        >>> embedding = Rows(torch.randint(10, (8, 4)), torch.randn(8, 4, 3), rows=10)
        >>> contract_sum([head, embedding], numel=30).shape
        torch.Size([30])
    """
    first, *rest = parts if len(parts) == 1 else sum_in_forms(parts, numel)
    out = contract(first, numel=numel, out=out, beta=beta, alpha=alpha, keep=keep)
    if not rest:
        return out
    (rows,) = rest  # (A + B)² = A² + B² + 2 A ⊙ B, the last only in the few rows of B
    assert isinstance(first, Outer)
    assert isinstance(rows, Rows)
    contract(rows, numel=numel, out=out, alpha=alpha, keep=keep)
    cross = kept(in_rows(first, rows), keep)
    out.view(rows.rows, -1).index_add_(0, rows.ids.flatten(), cross.flatten(0, 1), alpha=2 * alpha)
    return out


def added(total: Tensor, out: Tensor | None, beta: float, alpha: float) -> Tensor:
    """``out ← beta · out + alpha · total`` in place; without ``out``, alpha · total."""
    if out is None:
        return total if alpha == 1.0 else total * alpha
    if beta == 0.0:
        return torch.mul(total, alpha, out=out)
    return _scaled(out, beta).add_(total, alpha=alpha)


def _scaled(out: Tensor, beta: float) -> Tensor:
    if beta == 0.0:  # zero times nan is nan
        return out.zero_()
    return out if beta == 1.0 else out.mul_(beta)
