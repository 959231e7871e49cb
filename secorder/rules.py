"""Per-sample gradients of one layer, one rule a layer type, and the contraction that every curvature is made of.

A layer that is linear in its parameters θ maps, for each sample n, a cotangent g_n on its output z_n to a gradient
J_nᵀ g_n on θ. A *rule* is the function that does so for one layer type, for all samples at once::

    rule(module, inputs, g) -> {parameter name: per-sample gradient}

``inputs`` are the tensors that the module was called with and ``g`` has the shape of its output, both with samples in
dim 0. A per-sample gradient is either dense, of shape ``(N, *parameter.shape)``, or an :class:`Outer`, two factors
whose product it is, never formed where it needn't be, or :class:`Rows`, zero but in a few rows. :func:`contract` turns
two of them, fed with cotangents u and v, into the diagonal that belongs to the pair::

    contract(u, v) = Σ_n (J_nᵀ u_n) ⊙ (J_nᵀ v_n)

To teach the library a layer type, write its rule and enter it: ``RULES[MyLayer] = my_rule``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ._torch.modules import computes_as, convolution_padding
from ._torch.vjp import chunks
from .errors import AttributionError

__all__ = [
    "DIM_ZERO",
    "IN_PLACE_ELEMENTS",
    "RULES",
    "Layout",
    "Outer",
    "Patches",
    "PerSample",
    "Rows",
    "Rule",
    "candidate_layouts",
    "contract",
    "contract_basis",
    "contract_sum",
    "dense",
    "magnitude",
    "per_sample_gradients",
    "rule_for",
    "stacked_gradients",
    "total_gradient",
    "with_cotangents",
]

#: Elements of patches and of per-sample gradients that one step of a contraction may form: what stays in the caches
#: of a CPU (measured on convolutions: up to twice as fast as four times as many), more on an accelerator.
CHUNK_ELEMENTS = 1 << 20
ACCELERATOR_CHUNK_ELEMENTS = 1 << 25
#: Elements of a parameter from which on a contraction adds to its result piece by piece, without a sum of its own.
IN_PLACE_ELEMENTS = 1 << 22
#: Elements of per-sample gradients of one grouped convolution, likewise measured.
CONVOLUTION_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Patches:
    """The patches of images, to be copied out a few samples at a time: the input factor of a convolution.

    Attributes:
        image: padded images, shape ``(N, channels, …)``.
        kernel: size of a patch.
        stride: steps between patches.
        dilation: steps inside of a patch.
        groups: groups of channels.
        shape: that of the patches, ``(N, groups, positions, in)``.
    """

    image: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    shape: tuple[int, int, int, int]

    def convolves_well(self, width: int) -> bool:
        """Whether :meth:`weight_gradients` is faster than copies of the patches and a matrix product.

        By shape alone, so that a run can be repeated bit for bit: on oneDNN, measured from 3 to 512 channels, where
        there is enough to do at each sample for what a call and its reordering of memory cost.
        """
        image, (_, groups, positions, fan_in) = self.image, self.shape
        if image.device.type != "cpu" or image.dtype is not torch.float32 or not torch.backends.mkldnn.enabled:
            return False
        return groups == 1 and image.shape[1] >= 16 and positions >= (64 if width * fan_in >= 1 << 17 else 256)

    def weight_gradients(self, rows: slice, g: Tensor) -> Tensor:
        """Per-sample gradients of some samples as one convolution with a group for each, no patches copied.

        Args:
            rows: the samples.
            g: cotangent factor, shape ``(N, groups, positions, out)``.

        Returns:
            shape ``(n · groups, out, in)``.
        """
        image, spatial = self.image[rows], len(self.kernel)
        factor = g[rows].transpose(2, 3)
        count, groups, width, _ = factor.shape
        sizes = [
            (size - gap * (k - 1) - 1) // step + 1
            for size, k, step, gap in zip(image.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        ]
        backward = (conv1d_weight, conv2d_weight, conv3d_weight)[spatial - 1]
        gradients: Tensor = backward(  # type: ignore[no-untyped-call]
            image.reshape(1, -1, *image.shape[2:]),
            (count * groups * width, image.shape[1] // groups, *self.kernel),
            factor.reshape(1, -1, *sizes),
            stride=self.stride,
            dilation=self.dilation,
            groups=count * groups,
        )
        return gradients.view(count * groups, width, -1)

    def __getitem__(self, rows: slice) -> Tensor:
        """The patches of some samples (a slice), copied out."""
        spatial = len(self.kernel)
        a = _windows(self.image[rows], self.kernel, self.stride, self.dilation, [None] * spatial)
        patches: Tensor = a.unflatten(1, (self.groups, -1)).transpose(2, 3)
        return patches


def _whole(a: "Tensor | Patches") -> Tensor:
    return a[:] if isinstance(a, Patches) else a


class Outer(NamedTuple):
    """A per-sample gradient in factors: ``Σ_p g[n, :, p, :]ᵀ a[n, :, p, :]``, reshaped to the parameter.

    Attributes:
        a: input factor, shape ``(N, groups, positions, in)``, perhaps as :class:`Patches`; None stands for a one at
            every position (a bias).
        g: cotangent factor, shape ``(N, groups, positions, out)``; the parameter has ``groups · out · in`` elements.
    """

    a: Tensor | Patches | None
    g: Tensor


class Rows(NamedTuple):
    """A per-sample gradient that is zero but in a few rows of the parameter: row ``ids[n, p]`` gets ``g[n, p]``.

    Attributes:
        ids: shape ``(N, positions)``; a row may come more than once, and gets the sum.
        g: cotangents, shape ``(N, positions, width)``.
        rows: number of the parameter's rows.
    """

    ids: Tensor
    g: Tensor
    rows: int


PerSample = Outer | Rows | Tensor
Rule = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Mapping[str, PerSample]]


class Layout(NamedTuple):
    """Where the samples of a layer's input and output are.

    Attributes:
        dim: the dimension that holds them.
        rows: how many rows of that dimension belong to one sample (flattened tokens, dim 0 only).
        sample_major: whether the rows of one sample follow each other (``n·T + t``) or are T apart (``t·N + n``).
    """

    dim: int = 0
    rows: int = 1
    sample_major: bool = True

    def size(self, tensor: Tensor) -> int:
        """The number of samples in a tensor of this layout."""
        return tensor.shape[self.dim] // self.rows

    def split(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(N, ...)``, a view where it can be."""
        if self.rows == 1:
            return tensor.movedim(self.dim, 0)
        if self.sample_major:
            return tensor.reshape(-1, self.rows, *tensor.shape[1:])
        return tensor.reshape(self.rows, -1, *tensor.shape[1:]).movedim(1, 0)

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        if self.rows == 1:
            return tensor.movedim(0, self.dim)
        return (tensor if self.sample_major else tensor.movedim(0, 1)).flatten(0, 1)


DIM_ZERO = Layout()


# --------------------------------------------------------------------------------------------------------------------
# From the calls of a layer to its per-sample gradients


def per_sample_gradients(
    rule: Rule,
    module: nn.Module,
    calls: Sequence[tuple[tuple[Tensor, ...], Tensor]],
    layouts: Sequence[Layout] | None = None,
) -> dict[str, PerSample]:
    """J_nᵀ g_n of a layer for every sample, summed over the layer's calls in one forward.

    Args:
        rule: the layer type's rule.
        module: the layer.
        calls: for each call the input tensors and a cotangent of the output's shape.
        layouts: for each call where the samples are; dim 0 by default.

    Returns:
        per-sample gradients by the parameter's name in the module.
    """
    parts = []
    for index, (inputs, g) in enumerate(calls):
        layout = layouts[index] if layouts else DIM_ZERO
        if layout.dim:
            inputs, g = tuple(x.movedim(layout.dim, 0) for x in inputs), g.movedim(layout.dim, 0)
        gradients = rule(module, inputs, g)
        if layout.rows > 1:
            gradients = {name: _regroup(gradient, layout) for name, gradient in gradients.items()}
        parts.append(gradients)
    return {name: _merge([part[name] for part in parts]) for name in parts[0]}


def stacked_gradients(
    rule: Rule,
    module: nn.Module,
    inputs: Sequence[tuple[Tensor, ...]],
    cotangents: Sequence[Tensor],
    layouts: Sequence[Layout] | None = None,
) -> dict[str, PerSample]:
    """:func:`per_sample_gradients` for K cotangents at once: each call's has shape ``(K, *output.shape)``.

    What does not depend on the cotangent (the input factor of an :class:`Outer`, the ids of :class:`Rows`) is shared
    by all K; their ``g``, or the dense gradient, is stacked in dim 0.
    """

    def gradients(gs: tuple[Tensor, ...]) -> dict[str, PerSample]:
        return per_sample_gradients(rule, module, list(zip(inputs, gs, strict=True)), layouts)

    def cotangent_factors(*gs: Tensor) -> dict[str, Tensor]:
        return {name: part if isinstance(part, Tensor) else part.g for name, part in gradients(gs).items()}

    first = gradients(tuple(c[0] for c in cotangents))
    stacked = torch.vmap(cotangent_factors)(*cotangents)
    return {name: with_cotangents(part, lambda _, name=name: stacked[name]) for name, part in first.items()}  # type: ignore[misc]


def with_cotangents(gradient: PerSample, change: Callable[[Tensor], Tensor]) -> PerSample:
    """A per-sample gradient with its cotangent factor changed, in which it is linear; of a dense one, itself."""
    return change(gradient) if isinstance(gradient, Tensor) else gradient._replace(g=change(gradient.g))


def _regroup(gradient: PerSample, layout: Layout) -> PerSample:
    if isinstance(gradient, Rows):  # (N·T, P) -> (N, T·P)
        ids, g = (layout.split(t).flatten(1, 2) for t in (gradient.ids, gradient.g))
        return Rows(ids, g, gradient.rows)
    if isinstance(gradient, Outer):  # (N·T, G, P, k) -> (N, G, T·P, k)

        def grouped(factor: Tensor) -> Tensor:
            return layout.split(factor).movedim(1, 2).flatten(2, 3)

        return Outer(None if gradient.a is None else grouped(_whole(gradient.a)), grouped(gradient.g))
    return layout.split(gradient).sum(1)


def _merge(parts: Sequence[PerSample]) -> PerSample:
    """The sum of per-sample gradients in one form."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Outer):
        inputs = [part.a for part in parts]  # type: ignore[union-attr]
        a = None if inputs[0] is None else torch.cat([_whole(x) for x in inputs if x is not None], 2)
        return Outer(a, torch.cat([part.g for part in parts], 2))  # type: ignore[union-attr]
    if isinstance(parts[0], Rows):
        ids = torch.cat([part.ids for part in parts], 1)  # type: ignore[union-attr]
        return Rows(ids, torch.cat([part.g for part in parts], 1), parts[0].rows)  # type: ignore[union-attr]
    return torch.stack(list(parts)).sum(0)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# The contraction


def contract(
    u: PerSample,
    v: PerSample | None = None,
    *,
    numel: int,
    out: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """Σ_n u_n ⊙ v_n of two per-sample gradients, the one contraction of the library.

    Args:
        u: per-sample gradient J_nᵀ u_n, single or stacked over K cotangents, which are summed over as well.
        v: the same for the other cotangent and the same input factor; None means ``u`` itself (squares).
        numel: number of the parameter's elements.
        out: where given, ``out ← beta · out + alpha · result`` in place; at once, unless it has more than
            :data:`IN_PLACE_ELEMENTS`.
        beta: factor of what ``out`` held.
        alpha: factor of the result.

    Returns:
        1-D tensor of ``numel`` elements, in the order of the flattened parameter.
    """
    if isinstance(u, Tensor):
        assert v is None or isinstance(v, Tensor)
        return _add((u * (u if v is None else v)).reshape(-1, numel).sum(0), out, beta, alpha)
    if isinstance(u, Rows):
        assert v is None or isinstance(v, Rows)
        return _contract_rows(u, v, numel, out, beta, alpha)
    assert v is None or isinstance(v, Outer)
    a, gu, gv = u.a, u.g, u.g if v is None else v.g
    groups, positions = gu.shape[-3], gu.shape[-2]
    if positions == 1:
        # One position: the per-sample gradient is a rank-one product and its square factorises, so that
        # Σ_n (u_n ⊙ v_n)(a_n ⊙ a_n)ᵀ is one matrix product.
        pairs = (gu * gv).squeeze(-2)
        if pairs.dim() == 4:
            pairs = pairs.sum(0)
        if a is None:
            return _add(pairs.sum(0).reshape(numel), out, beta, alpha)
        a = _whole(a)
        if groups == 1 and out is not None:
            squares = a[:, 0, 0] * a[:, 0, 0]
            out.view(-1, a.shape[-1]).addmm_(pairs[:, 0].t(), squares, beta=beta, alpha=alpha)
            return out
        squares = (a * a).squeeze(2)
        if out is None:
            total = torch.bmm(pairs.permute(1, 2, 0), squares.transpose(0, 1)).reshape(numel)
            return total if alpha == 1.0 else total * alpha
        target = out.view(groups, -1, a.shape[-1])
        target.baddbmm_(pairs.permute(1, 2, 0), squares.transpose(0, 1), beta=beta, alpha=alpha)
        return out
    pairs_of_k = [(gu, gv)] if gu.dim() == 4 else list(zip(gu, gv, strict=True))
    if out is not None and numel > IN_PLACE_ELEMENTS:
        if beta != 1.0:
            out.mul_(beta)
        for gu_k, gv_k in pairs_of_k:
            _accumulate_products(out, a, gu_k, gv_k if gv is not gu else None, alpha)
        return out
    total = gu.new_zeros(numel)
    for gu_k, gv_k in pairs_of_k:
        _accumulate_products(total, a, gu_k, gv_k if gv is not gu else None)
    return _add(total, out, beta, alpha)


def _accumulate_products(
    total: Tensor, a: Tensor | Patches | None, gu: Tensor, gv: Tensor | None, alpha: float = 1.0
) -> None:
    """Add α Σ_n (Σ_p gu aᵀ) ⊙ (Σ_p gv aᵀ) to ``total``, forming a few samples and rows of the parameter at a time."""
    budget = CHUNK_ELEMENTS if gu.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    count, groups, positions, width = gu.shape
    if a is None:
        for n in chunks(count, max(1, budget // max(1, total.numel()))):
            left = gu[n.start : n.stop].sum(2).flatten(1)
            right = left if gv is None else gv[n.start : n.stop].sum(2).flatten(1)
            total.add_((left * right).sum(0), alpha=alpha)
        return
    fan_in = a.shape[-1]
    target = total.view(groups, width, fan_in)
    # Measured from 64 to 50,000 rows: one piece is best up to 16 MB, and pieces of 4 MB for what is larger.
    rows = width if total.numel() <= 4 * budget else min(width, max(1, budget // (groups * fan_in)))
    if isinstance(a, Patches) and a.convolves_well(width):
        for n in chunks(count, max(1, CONVOLUTION_ELEMENTS // total.numel())):
            left = a.weight_gradients(slice(n.start, n.stop), gu)
            right = left if gv is None else a.weight_gradients(slice(n.start, n.stop), gv)
            _add_products(target, left, right, alpha)
            del left, right  # before the next are formed
        return
    for n in chunks(count, max(1, budget // (groups * (rows + positions) * fan_in))):
        _add_matrix_products(target, a, gu, gv, rows, n, alpha)


def _add_matrix_products(
    target: Tensor, a: Tensor | Patches, gu: Tensor, gv: Tensor | None, rows: int, n: range, alpha: float
) -> None:
    """:func:`_accumulate_products` of some samples, by matrix products of so many rows of the parameter."""
    # bmm on three dimensions: matmul on four copies what is not contiguous
    inputs = a[n.start : n.stop].flatten(0, 1)
    left_t = gu[n.start : n.stop].flatten(0, 1).transpose(1, 2)
    right_t = None if gv is None else gv[n.start : n.stop].flatten(0, 1).transpose(1, 2)
    for r in chunks(target.shape[1], rows):
        left = torch.bmm(left_t[:, r.start : r.stop], inputs)
        right = left if right_t is None else torch.bmm(right_t[:, r.start : r.stop], inputs)
        _add_products(target[:, r.start : r.stop], left, right, alpha)
        del left, right  # before the next are formed


def _add_products(target: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add α Σ_n left_n ⊙ right_n to ``target`` (groups, out, in), for both of shape (N · groups, out, in)."""
    if len(left) == 1:
        target[0].addcmul_(left[0], right[0], value=alpha)
    else:  # in place where it may be: ``left`` was formed for this, and another copy would double the peak of memory
        products = left * right if left.requires_grad else left.mul_(right)
        target.add_(products.unflatten(0, (-1, len(target))).sum(0), alpha=alpha)


def _contract_rows(u: Rows, v: Rows | None, numel: int, out: Tensor | None, beta: float, alpha: float) -> Tensor:
    """:func:`contract` of :class:`Rows`, on the rows of each sample that are not zero."""
    count, width = len(u.ids), u.g.shape[-1]
    offset = torch.arange(count, device=u.ids.device)[:, None] * u.rows
    places, where = (u.ids + offset).unique(return_inverse=True)  # one for each sample and row

    def compact(g: Tensor) -> Tensor:
        flat = g.flatten(-3, -2)
        return flat.new_zeros(*flat.shape[:-2], len(places), width).index_add(-2, where.flatten(), flat)

    left = compact(u.g)
    products = left * (left if v is None else compact(v.g))
    if products.dim() == 3:
        products = products.sum(0)
    if out is None:
        total = products.new_zeros(u.rows, width).index_add(0, places % u.rows, products)
        return total.reshape(numel) * alpha
    if beta != 1.0:
        out.mul_(beta)
    out.view(u.rows, width).index_add_(0, places % u.rows, products, alpha=alpha)
    return out


def contract_sum(
    parts: Sequence[PerSample], *, numel: int, out: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Σ_n (Σ_i u_{i, n})²: :func:`contract` for a parameter that gets its gradient from several layers.

    Args:
        parts: each layer's per-sample gradients of the parameter.
        numel: number of the parameter's elements.
        out: as for :func:`contract`.
        beta: as for :func:`contract`.
        alpha: as for :func:`contract`.
    """
    if len(parts) == 1:
        return contract(parts[0], numel=numel, out=out, beta=beta, alpha=alpha)
    forms: dict[type, list[PerSample]] = {}
    for part in parts:
        forms.setdefault(type(part), []).append(part)
    merged = {form: _merge(same) for form, same in forms.items()}
    if len(merged) == 1:
        return contract(next(iter(merged.values())), numel=numel, out=out, beta=beta, alpha=alpha)
    outer, rows = merged.get(Outer), merged.get(Rows)
    if len(merged) > 2 or not isinstance(outer, Outer) or not isinstance(rows, Rows) or outer.a is None:
        total = torch.stack([dense(part, numel) for part in merged.values()]).sum(0)
        return contract(total, numel=numel, out=out, beta=beta, alpha=alpha)
    # An embedding and a head: (A + B)² = A² + B² + 2 A ⊙ B, the last only in the few rows of B.
    out = contract(outer, numel=numel, out=out, beta=beta, alpha=alpha)
    contract(rows, numel=numel, out=out, alpha=alpha)
    columns = outer.g[:, 0].gather(2, rows.ids[:, None].expand(-1, outer.g.shape[2], -1))
    cross = torch.bmm(columns.transpose(1, 2), _whole(outer.a)[:, 0]) * rows.g
    out.view(rows.rows, -1).index_add_(0, rows.ids.flatten(), cross.flatten(0, 1), alpha=2 * alpha)
    return out


def dense(gradient: PerSample, numel: int) -> Tensor:
    """Per-sample gradients written out, shape ``(N, numel)``."""
    if isinstance(gradient, Tensor):
        return gradient.reshape(-1, numel)
    if isinstance(gradient, Outer):
        if gradient.a is None:
            return gradient.g.sum(2).reshape(-1, numel)
        return torch.matmul(gradient.g.transpose(2, 3), _whole(gradient.a)).reshape(-1, numel)
    index = gradient.ids.unsqueeze(-1).expand_as(gradient.g)
    written = gradient.g.new_zeros(len(gradient.g), gradient.rows, gradient.g.shape[-1])
    return written.scatter_add(1, index, gradient.g).reshape(-1, numel)


def total_gradient(gradient: PerSample, numel: int) -> Tensor:
    """Σ_n of per-sample gradients, flat: the layer's whole gradient, as far as it is explained by them."""
    if isinstance(gradient, Tensor):
        return gradient.reshape(-1, numel).sum(0)
    if isinstance(gradient, Rows):
        total = gradient.g.new_zeros(gradient.rows, gradient.g.shape[-1])
        return total.index_add(0, gradient.ids.flatten(), gradient.g.flatten(0, 1)).reshape(numel)
    g = gradient.g.transpose(0, 1).flatten(1, 2)  # (groups, N · positions, out)
    if gradient.a is None:
        return g.sum(1).reshape(numel)
    if isinstance(gradient.a, Patches):  # a few samples' patches at a time
        samples = max(1, CHUNK_ELEMENTS // max(1, math.prod(gradient.a.shape[1:])))
        parts = gradient.g.split(samples)
        starts = range(0, len(gradient.g), samples)
        return torch.stack(
            [
                total_gradient(Outer(gradient.a[i : i + samples], part), numel)
                for i, part in zip(starts, parts, strict=True)
            ]
        ).sum(0)
    return torch.bmm(g.transpose(1, 2), gradient.a.transpose(0, 1).flatten(1, 2)).reshape(numel)


def magnitude(gradient: PerSample, numel: int) -> Tensor:
    """The largest element of :func:`total_gradient` of absolute values: what rounding is relative to."""
    if isinstance(gradient, Outer):
        a = gradient.a
        if isinstance(a, Patches):
            a = replace(a, image=a.image.abs())
        elif a is not None:
            a = a.abs()
        gradient = Outer(a, gradient.g)
    return total_gradient(with_cotangents(gradient, torch.abs), numel).amax()


def contract_basis(u: PerSample, v: PerSample, *, numel: int) -> Tensor:
    """:func:`contract` of K stacked pairs where every v is a basis vector of the layer's output.

    Where the parameter's factor of a basis vector is one element again, at (group, position p, row o), only that row
    of the parameter is touched: ``Σ_n (Σ_q u[n, q, o] a[n, q]) ⊙ a[n, p]``, ``out`` times less work.

    Args:
        u: per-sample gradients of K cotangents.
        v: the basis vectors' per-sample gradients; of the sample dimension only one row is needed for an Outer.
        numel: number of the parameter's elements.
    """
    if not (isinstance(u, Outer) and isinstance(v, Outer)):
        return contract(u, v, numel=numel)
    count, (groups, positions, width) = u.g.shape[0], v.g.shape[-3:]
    a = u.g.new_ones(()).expand(u.g.shape[1], groups, positions, 1) if u.a is None else _whole(u.a)
    factors = v.g[:, 0].reshape(count, -1)
    if not bool(((factors != 0).sum(1) == 1).all()):
        return contract(u, Outer(u.a, v.g.expand_as(u.g)), numel=numel)
    index = factors.abs().argmax(1)
    scale = factors.gather(1, index[:, None])  # (K, 1)
    group, position, column = index // (positions * width), index // width % positions, index % width
    if positions == 1:  # only the diagonal of each sample's block is asked for, and squares of the input
        rows = u.g[torch.arange(count, device=index.device), :, group, 0, column] * scale
        diagonal = a.new_zeros(groups * width, a.shape[0]).index_add(0, group * width + column, rows)
        squares = (a * a).squeeze(2).transpose(0, 1)
        return torch.bmm(diagonal.view(groups, width, -1), squares).reshape(numel)
    total = a.new_zeros(groups * width, a.shape[-1])
    for chunk in torch.arange(count, device=index.device).split(max(1, CHUNK_ELEMENTS // max(1, a[:, 0].numel()))):
        g, p, o = group[chunk], position[chunk], column[chunk]
        inputs = a.transpose(0, 1)[g]  # (k, N, P, in)
        weights = u.g[chunk, :, g, :, o]  # (k, N, P)
        here = inputs.gather(2, p.view(-1, 1, 1, 1).expand(-1, inputs.shape[1], 1, inputs.shape[-1])).squeeze(2)
        rows = ((weights.unsqueeze(2) @ inputs).squeeze(2) * here).sum(1) * scale[chunk]
        total = total.index_add(0, g * width + o, rows)
    return total.reshape(numel)


def _add(total: Tensor, out: Tensor | None, beta: float, alpha: float) -> Tensor:
    if out is None:
        return total if alpha == 1.0 else total * alpha
    if beta != 1.0:
        out.mul_(beta)
    return out.add_(total, alpha=alpha)


# --------------------------------------------------------------------------------------------------------------------
# The rules


def linear(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = a Wᵀ + b, over any number of positions between the sample and the feature dimension."""
    a = inputs[0]
    samples, width = a.shape[0], a.shape[-1]
    a = a.reshape(samples, 1, -1, width)
    g = g.reshape(samples, 1, -1, g.shape[-1])
    return {"weight": Outer(a, g), "bias": _bias(g)}


def convolution(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = W ⋆ a + b, any number of spatial dimensions and every setting of ``nn.ConvNd``."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    a = _padded(module, inputs[0])
    groups, spatial = module.groups, len(module.kernel_size)
    _expect_dims(module, a, spatial + 2)
    factor = g.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
    fan_in = a.shape[1] // groups * math.prod(module.kernel_size)
    shape = (len(a), groups, math.prod(g.shape[2:]), fan_in)
    patches = Patches(a, module.kernel_size, module.stride, module.dilation, groups, shape)
    return {"weight": Outer(patches, factor), "bias": _bias(factor)}


def _bias(g: Tensor) -> Outer:
    """The gradient of a bias that is added at every position: its input is one."""
    return Outer(None, g)


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor) -> Tensor:
    sides = convolution_padding(module)
    if not any(sides):
        return a
    return F.pad(a, sides, "constant" if module.padding_mode == "zeros" else module.padding_mode)


def _expect_dims(module: nn.Module, a: Tensor, dims: int) -> None:
    if a.dim() != dims:
        raise AttributionError(
            f"{type(module).__name__} was called without a batch dimension (input of {a.dim()} dimensions, "
            f"expected {dims}): add one with unsqueeze(0)."
        )


def transposed_convolution(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = Wᵀ-convolution of a: the adjoint of a convolution, so that a and g change places."""
    assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    a, groups, spatial = inputs[0], module.groups, len(module.kernel_size)
    _expect_dims(module, a, spatial + 2)
    # The convolution that this one is the adjoint of sees g, padded, at the positions of a; rows that
    # ``output_padding`` added and that no position reaches are cut off.
    padding = [int(pad) for pad in module.padding]
    windows = F.pad(g, [side for pad in reversed(padding) for side in (pad, pad)])
    windows = _windows(windows, module.kernel_size, module.stride, module.dilation, a.shape[2:])
    windows = windows.unflatten(1, (groups, -1))
    products = a.flatten(2).unflatten(1, (groups, -1)) @ windows.transpose(2, 3)
    return {"weight": products.reshape(-1, *module.weight.shape), "bias": g.flatten(2).sum(2)}


def _windows(
    a: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], positions: Sequence[int | None]
) -> Tensor:
    """Patches of an image (N, C, …) as ``(N, C · kernel, P)``.

    The copy runs along rows of pixels, which makes it several times faster than ``F.unfold`` on the CPU.
    """
    spatial = len(kernel)
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        a = a.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
        wanted = positions[dim - 2]
        if wanted is not None:
            a = a.narrow(dim, 0, wanted)
    order = [0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial)]
    return a.permute(order).flatten(-spatial).flatten(1, -2)


def _affine(normalised: Tensor, g: Tensor, kept: Sequence[int]) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β: products with the normalised input, summed over all dimensions but the sample's and ``kept``."""
    rest = [dim for dim in range(1, g.dim()) if dim not in kept]
    weight, bias = normalised * g, g
    return {"weight": weight.sum(rest), "bias": bias.sum(rest)} if rest else {"weight": weight, "bias": bias}


def layer_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β with x̂ normalised over the last dimensions."""
    assert isinstance(module, nn.LayerNorm)
    normalised = F.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)
    return _affine(normalised, g, range(g.dim() - len(module.normalized_shape), g.dim()))


def rms_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x / rms(x) over the last dimensions."""
    assert isinstance(module, nn.RMSNorm)
    normalised = F.rms_norm(inputs[0], module.normalized_shape, eps=module.eps)
    return {"weight": _affine(normalised, g, range(g.dim() - len(module.normalized_shape), g.dim()))["weight"]}


def group_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β by channel, x̂ normalised over groups of channels of one sample."""
    assert isinstance(module, nn.GroupNorm)
    return _affine(F.group_norm(inputs[0], module.num_groups, eps=module.eps), g, [1])


#: By the number of their spatial dimensions, from one.
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def instance_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β by channel, x̂ normalised by the sample's own or, in eval mode, by running statistics."""
    assert isinstance(module, _INSTANCE_NORMS)
    _expect_dims(module, inputs[0], next(i for i, kind in enumerate(_INSTANCE_NORMS, 3) if isinstance(module, kind)))
    if module.track_running_stats and not module.training:
        return _affine(_by_running_statistics(module, inputs[0]), g, [1])
    return _affine(F.instance_norm(inputs[0], eps=module.eps), g, [1])


def batch_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β by channel, x̂ normalised by running statistics or, in train mode, by the batch's."""
    assert isinstance(module, (*_BATCH_NORMS, nn.SyncBatchNorm))
    if module.training or module.running_mean is None:
        return _affine(F.batch_norm(inputs[0], None, None, training=True, eps=module.eps), g, [1])
    return _affine(_by_running_statistics(module, inputs[0]), g, [1])


def _by_running_statistics(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, (*_INSTANCE_NORMS, *_BATCH_NORMS, nn.SyncBatchNorm))
    assert module.running_mean is not None
    assert module.running_var is not None
    shape = (1, -1, *(1,) * (x.dim() - 2))
    scale = torch.rsqrt(module.running_var.to(x.dtype) + module.eps)
    return (x - module.running_mean.to(x.dtype).view(shape)) * scale.view(shape)


def embedding(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = rows of the table: each row gets the sum of the cotangents where it was looked up."""
    assert isinstance(module, nn.Embedding)
    ids = inputs[0].long()
    ids = ids.flatten(1) if ids.dim() > 1 else ids[:, None]
    if module.padding_idx is not None:
        g = g * (inputs[0] != module.padding_idx).unsqueeze(-1)
    return {"weight": Rows(ids, g.reshape(*ids.shape, -1), module.num_embeddings)}


def prelu(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = max(0, x) + w ⊙ min(0, x), w one number or one a channel."""
    assert isinstance(module, nn.PReLU)
    products = inputs[0].clamp(max=0) * g
    if module.num_parameters == 1:
        return {"weight": products.flatten(1).sum(1, keepdim=True)}
    rest = list(range(2, products.dim()))
    return {"weight": products.sum(rest) if rest else products}


def bilinear(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z_k = x₁ᵀ W_k x₂ + b_k: a linear layer on the products of its two inputs."""
    first, second = inputs
    products = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
    return linear(module, (products,), g)


#: The rules by layer type; subclasses that do not override ``forward`` use their base's. Yours can be added.
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: transposed_convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.ConvTranspose3d: transposed_convolution,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.InstanceNorm1d: instance_norm,
    nn.InstanceNorm2d: instance_norm,
    nn.InstanceNorm3d: instance_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.Embedding: embedding,
    nn.PReLU: prelu,
    nn.Bilinear: bilinear,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule that is exact for this module, or None.

    A rule speaks for the module only where the module still computes what its type does: ``forward`` is the type's
    own, and its parameters are the type's own too (no parametrization, no weight kept under another name).
    """
    for kind in type(module).__mro__:
        rule = RULES.get(kind)
        if rule is not None:
            break
    else:
        return None
    if not computes_as(module, kind):
        return None
    own = {name for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)}
    if hasattr(module, "parametrizations") or len(own) != sum(1 for _ in module.parameters()):
        return None
    if kind in _BUILT_IN and not own <= {"weight", "bias"}:
        return None
    return rule


_BUILT_IN = frozenset(RULES)

#: Rules of layers that treat all leading dimensions alike, so that samples may be in dim 1 (time-major sequences).
_ANY_LEADING_DIM: frozenset[Rule] = frozenset({linear, layer_norm, rms_norm, embedding, bilinear})


def candidate_layouts(rule: Rule, inputs: tuple[Tensor, ...], output: Tensor, num_samples: int) -> list[Layout]:
    """Where the samples of a call may be, by shape alone, the usual place first; to be verified by the caller."""
    candidates = []
    if output.dim():
        rows, rest = divmod(output.shape[0], num_samples)
        if rest == 0 and rows == 1:
            candidates.append(DIM_ZERO)
        elif rest == 0 and rows > 1:
            candidates += [Layout(0, rows, True), Layout(0, rows, False)]
    if rule in _ANY_LEADING_DIM and output.dim() > 2 and output.shape[1] == num_samples:
        candidates.append(Layout(1))
    return [c for c in candidates if all(x.dim() > c.dim and x.shape[c.dim] == output.shape[c.dim] for x in inputs)]
