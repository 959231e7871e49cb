"""Layers by their recorded outputs z: cotangents on the model's output pulled back to every z and contracted there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._torch.failures import is_missing_graph
from ._torch.pytree import map_tensors
from ._torch.vjp import chunks, default_chunk_size, stacked_vjp
from .errors import AttributionError
from .layers import Layer
from .rules import DIM_ZERO, Layout, PerSample, candidate_layouts, contract, stacked_gradients, with_cotangents
from .sharded import local

__all__ = [
    "Pairs",
    "ZLayer",
    "block_diagonal",
    "cast",
    "compute_dtype",
    "contract_pairs",
    "expose_output",
    "known_roots",
    "layout_options",
    "loss_of_output",
    "loss_separates",
    "output_hessian",
    "over_samples",
    "rounding",
    "sample_bits",
    "scale_draws",
    "scales",
    "signed_roots",
    "zeros",
]

#: Tells which dimension of an output tensor holds the samples.
Dimensions = Callable[[Tensor], int | None]


@dataclass
class ZLayer:
    """A layer with its recorded calls.

    Attributes:
        layer: the layer; it has a rule wherever its calls are used.
        inputs: the input tensors of each call.
        leaves: for each call the zero leaf ε that was added to its output z.
        layouts: for each call where its samples are.
        with_graph: whether what is computed from the inputs is to be differentiable.
    """

    layer: Layer
    inputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    with_graph: bool = False

    @property
    def sizes(self) -> list[int]:
        """Elements of one sample's output, by call."""
        return [leaf.numel() // layout.size(leaf) for leaf, layout in zip(self.leaves, self.layouts, strict=True)]

    @property
    def numel(self) -> int:
        """Number of the layer's parameter elements."""
        return sum(p.numel() for p in self.layer.parameters.values())

    def gradients(self, cotangents: Sequence[Tensor]) -> dict[str, PerSample]:
        """Per-sample gradients of K stacked cotangents on the layer's calls."""
        assert self.layer.rule is not None
        kind = compute_dtype(self.layer)
        inputs = [tuple(cast(x if self.with_graph else x.detach(), kind) for x in call) for call in self.inputs]
        return stacked_gradients(
            self.layer.rule, self.layer.module, inputs, [cast(c, kind) for c in cotangents], self.layouts
        )


def compute_dtype(layer: Layer) -> torch.dtype:
    """The dtype a layer's curvature is accumulated in: float32 for half precision, else the parameters' own."""
    dtype = torch.float32
    for parameter in layer.parameters.values():
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype`` if it holds real numbers, as it is if it holds indices."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def rounding(dtype: torch.dtype) -> float:
    """What passes for rounding, relative to the largest entry: a thousand units in the last place, or 1/16."""
    return min(1024 * torch.finfo(dtype).eps, 1 / 16)


def zeros(layer: Layer) -> list[Tensor]:
    """A zero diagonal, by parameter; of a sharded one this rank's part."""
    parts = [local(p) for p in layer.parameters.values()]
    return [part.new_zeros(part.numel(), dtype=compute_dtype(layer)) for part in parts]


# --------------------------------------------------------------------------------------------------------------------
# Samples


def over_samples(values: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """Values (K, N) of samples, spread over tensors of a layout: shape ``(K, *like.shape)``."""
    split = layout.split(like.detach())
    stacked = values.view(*values.shape, *(1,) * (split.dim() - 1)).expand(-1, *split.shape)
    return stacked if layout == DIM_ZERO else torch.stack([layout.join(v) for v in stacked])


def sample_bits(count: int, device: torch.device | None = None) -> Tensor:
    """Masks (B, N) of the samples whose index has bit b set: any two samples differ in at least one of them."""
    index = torch.arange(count, device=device)
    return torch.stack([(index >> b) & 1 for b in range((count - 1).bit_length())] or [index]).bool()


def block_diagonal(
    slopes: Sequence[Tensor | None],
    points: Sequence[Tensor],
    layouts: Sequence[Layout],
    generator: torch.Generator,
) -> bool:
    """Whether a Hessian is block diagonal over samples: exactly zero between any two of them.

    For each bit of the sample index, a random v on the samples with that bit is multiplied by the Hessian; the other
    samples' rows must be exactly zero. Two samples differ in a bit, so a coupled pair escapes only where the product
    with a random v vanishes: with probability zero in exact arithmetic, or by underflow.

    Args:
        slopes: differentiable gradients of a scalar with respect to ``points``.
        points: the tensors that the Hessian is taken in.
        layouts: where each one's samples are.
        generator: for the random v.
    """
    count = layouts[0].size(points[0])
    if count == 1:
        return True
    bits = sample_bits(count, points[0].device)
    masks = [over_samples(bits, x, layout) for x, layout in zip(points, layouts, strict=True)]
    vectors = [
        torch.randn(mask.shape[1:], generator=generator, dtype=x.dtype, device=generator.device).to(x.device) * mask
        for x, mask in zip(points, masks, strict=True)
    ]
    products = stacked_vjp(slopes, points, vectors)
    return not any(bool((u.masked_fill(mask, 0) != 0).any()) for u, mask in zip(products, masks, strict=True))


def loss_separates(gradients: Sequence[Tensor | None], points: Sequence[Tensor], generator: torch.Generator) -> bool:
    """Whether a loss of outputs ``points`` (samples in dim 0) is a sum over samples, to second order."""
    return block_diagonal(gradients, points, [DIM_ZERO] * len(points), generator)


def layout_options(z: ZLayer, num_samples: int) -> list[list[Layout]]:
    """Layouts of all of a layer's calls that its rule accepts, by shape; the usual one first."""
    assert z.layer.rule is not None
    by_call = [
        candidate_layouts(z.layer.rule, inputs, leaf, num_samples)
        for inputs, leaf in zip(z.inputs, z.leaves, strict=True)
    ]
    if not all(by_call):
        return []
    options = []
    for index in range(max(map(len, by_call))):
        layouts = [call[min(index, len(call) - 1)] for call in by_call]
        trial = ZLayer(z.layer, z.inputs, z.leaves, layouts)
        try:
            trial.gradients([leaf.detach()[None] for leaf in z.leaves])
        except AttributionError:  # not a shape that the rule is for, such as a convolution without a batch
            continue
        options.append(layouts)
    return options


# --------------------------------------------------------------------------------------------------------------------
# The loss as a function of the model's output


def loss_of_output(
    loss_fn: Callable[[Any, Any], Tensor], output: Any, targets: Any, dims: Dimensions | None, loss: Tensor
) -> tuple[Tensor, list[Tensor], Any] | None:
    """The loss once more, on leaves that stand for the model's output; these leaves, and the output made of them.

    Args:
        loss_fn: the loss.
        output: the model's output.
        targets: what the loss takes second.
        dims: where an output tensor's samples are (see :func:`expose_output`).
        loss: its value on ``output``.

    Returns:
        None where the loss does not go by the output alone: it cannot be computed there (it differentiates the model,
        say), has another value (it draws random numbers), or does not depend on the leaves at all.
    """
    points: list[Tensor] = []
    exposed = expose_output(output, points, dims, detach=True)
    try:
        again = loss_fn(exposed, targets)
    except RuntimeError as error:
        if not is_missing_graph(error):
            raise
        return None
    if not again.requires_grad or not torch.equal(again.detach().reshape(()), loss.detach()):
        return None
    return again.reshape(()), points, exposed


# --------------------------------------------------------------------------------------------------------------------
# Pairs of cotangents on the output


@dataclass
class Pairs:
    """K pairs of cotangents on the model's output, sample by sample.

    Attributes:
        u: shape ``(K, N, C)``, C the elements of one sample's output (all output tensors together).
        v: the same; None means ``u`` times ``sign``.
        sign: shape ``(K, N)``; None means one.
    """

    u: Tensor
    v: Tensor | None = None
    sign: Tensor | None = None


def signed_roots(gradients: Sequence[Tensor | None], points: Sequence[Tensor], chunk_size: int | None = None) -> Pairs:
    """Signed square root of a per-sample Hessian as pairs: H_n = Σ_c sign[c, n] u[c, n] u[c, n]ᵀ.

    Args:
        gradients: of a loss that does not couple samples, with respect to ``points``, differentiable.
        points: tensors with samples in dim 0; C elements of one sample in all.
        chunk_size: products batched at most.

    Returns:
        at most C pairs; columns that vanish for every sample are left out.
    """
    hessian = output_hessian(gradients, points, chunk_size).detach().double()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    size = values.abs()
    size[size <= torch.finfo(torch.float64).eps * size.amax()] = 0  # rounding of a singular matrix
    columns = (vectors * size.sqrt()[:, None]).permute(2, 0, 1)
    keep = (size > 0).any(0)
    keep[-1] = True  # never none, so that a loss without curvature needs no case of its own
    sign = torch.where(size > 0, values.sign(), 1.0).T[keep].to(points[0].dtype)
    return Pairs(columns[keep].to(points[0].dtype), None, None if bool((sign >= 0).all()) else sign)


def known_roots(gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> Pairs | None:
    """The roots of cross entropy's Hessian, ``√(c p_k) (e_k − p)``, or of a quadratic's, ``√c e_k``, where they fit.

    A guess from the outputs alone, which holds if the product of the Hessian with a random vector is that of the guess,
    to rounding: a loss with another Hessian, such as one that couples samples, passes with probability zero, but for
    differences below rounding.
    """
    if len(points) != 1 or points[0].dim() != 2:
        return None
    f = points[0].detach()
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(f.shape, generator=generator, dtype=torch.float32).to(f)
    product = stacked_vjp(gradients, points, [r[None]])[0][0].detach()
    p = f.softmax(1)
    centred = p * (r - (p * r).sum(1, keepdim=True))
    for shape in (centred, r):
        scale = (product * shape).sum(1) / (shape * shape).sum(1).clamp(min=torch.finfo(f.dtype).tiny)
        bound = 64 * torch.finfo(f.dtype).eps * product.abs().amax()
        if bool((scale < 0).any()) or bool(((product - scale[:, None] * shape).abs() > bound).any()):
            continue
        eye = torch.eye(f.shape[1]).to(f)
        if shape is r:
            return Pairs(scale.sqrt()[None, :, None] * eye[:, None])
        return Pairs((scale[:, None] * p).sqrt().T[..., None] * (eye[:, None] - p))
    return None


def output_hessian(
    gradients: Sequence[Tensor | None],
    points: Sequence[Tensor],
    chunk_size: int | None = None,
    *,
    create_graph: bool = False,
) -> Tensor:
    """The loss's Hessian in the outputs, sample by sample, shape ``(N, C, C)``."""
    count = points[0].shape[0]
    sizes = [x[0].numel() for x in points]
    total = sum(sizes)
    rows = []
    for ids in chunks(total, default_chunk_size(count * total, points[0], chunk_size)):
        basis = points[0].new_zeros(len(ids), total)
        basis[range(len(ids)), list(ids)] = 1
        vectors = [
            part[:, None].expand(-1, count, -1).reshape(-1, *x.shape)
            for part, x in zip(basis.split(sizes, 1), points, strict=True)
        ]
        products = stacked_vjp(gradients, points, vectors, create_graph=create_graph)
        rows.append(torch.cat([u.reshape(len(ids), count, -1) for u in products], 2))
    return torch.cat(rows).permute(1, 0, 2)


def contract_pairs(
    heads: Sequence[Tensor],
    layers: Sequence[ZLayer],
    pairs: Pairs,
    *,
    certain: bool,
    generator: torch.Generator,
    chunk_size: int | None,
    create_graph: bool = False,
) -> list[list[Tensor] | None]:
    """Σ_k contract(Jᵀu_k, Jᵀv_k) of every layer at once, where rows of z belong to samples.

    That they do is verified: the vjp of a random mixture of the u_k, each sample weighted by a random factor, must be
    the mixture's vjp weighted row by row, to rounding. The first layout for which it holds is taken and entered into
    the layer.

    Args:
        heads: output tensors, samples in dim 0.
        layers: layers with recorded calls.
        pairs: the cotangents.
        certain: samples are known to be independent, and in dim 0 of every call: nothing is to be verified.
        generator: for the random factors.
        chunk_size: vjps batched at most.
        create_graph: make the results differentiable.

    Returns:
        for each layer the diagonal by parameter, or None where no layout passed.
    """
    leaves = [leaf for z in layers for leaf in z.leaves]
    count = heads[0].shape[0]
    sizes = [f[0].numel() for f in heads]

    def pull_back(stack: Tensor) -> dict[int, Tensor]:
        cotangents = [
            part.reshape(-1, *f.shape).to(f.dtype) for part, f in zip(stack.split(sizes, 2), heads, strict=True)
        ]
        found = stacked_vjp(heads, leaves, cotangents, create_graph=create_graph)
        return dict(zip((id(leaf) for leaf in leaves), found, strict=True))

    def random(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(pairs.u)

    plain: dict[int, Tensor] = {}
    if certain:
        for z in layers:
            z.layouts = [DIM_ZERO] * len(z.leaves)
    else:
        mixture = pairs.u if len(pairs.u) == 1 else torch.einsum("k,kno->no", random(len(pairs.u)), pairs.u)[None]
        plain = pull_back(mixture)
        options = [layout_options(z, count) for z in layers]
        for _ in range(scale_draws(leaves)):
            weights = 0.5 + random(count).abs()
            weighted = {key: u.detach() for key, u in pull_back(mixture.detach() * weights[:, None]).items()}
            options = [
                [c for c in choices if scales(z.leaves, c, plain, weighted, weights)]
                for z, choices in zip(layers, options, strict=True)
            ]
        for z, choices in zip(layers, options, strict=True):
            z.layouts = next(iter(choices), [])
    good = [z for z in layers if z.layouts or not z.leaves]
    totals: dict[tuple[int, str], Tensor] = {}
    elements = sum(leaf.numel() for leaf in leaves)
    for ids in chunks(len(pairs.u), default_chunk_size(elements, pairs.u, chunk_size)):
        here = slice(ids.start, ids.stop)
        u = plain if plain and len(pairs.u) == 1 else pull_back(pairs.u[here])
        v = None if pairs.v is None else pull_back(pairs.v[here])
        for z in good:
            left = z.gradients([u[id(leaf)] for leaf in z.leaves])
            right = None if v is None else z.gradients([v[id(leaf)] for leaf in z.leaves])
            for name, p in z.layer.parameters.items():
                other = right[name] if right is not None else _signed(left[name], pairs.sign, here)
                part = contract(left[name], other, numel=p.numel())
                key = (id(z), name)
                totals[key] = totals[key] + part if key in totals else part
    return [[totals[id(z), name] for name in z.layer.parameters] if z.layouts else None for z in layers]


def scales(
    leaves: Sequence[Tensor],
    layouts: Sequence[Layout],
    plain: dict[int, Tensor],
    weighted: dict[int, Tensor],
    weights: Tensor,
) -> bool:
    """Whether weighting the samples weighted their rows of every leaf's gradient, to rounding.

    Args:
        leaves: the leaves.
        layouts: for each where its samples are.
        plain: gradients by ``id(leaf)``, shape ``(1, *leaf.shape)``.
        weighted: the same for cotangents that are weighted sample by sample.
        weights: the weights, shape (N,).
    """
    for leaf, layout in zip(leaves, layouts, strict=True):
        expected = plain[id(leaf)].detach()[0] * over_samples(weights[None].to(leaf.dtype), leaf, layout)[0]
        expected, found = (layout.split(t).reshape(len(weights), -1) for t in (expected, weighted[id(leaf)][0]))
        bound = rounding(leaf.dtype) * expected.abs().amax(1, keepdim=True)  # each sample's own
        if not bool(((found - expected).abs() <= bound).all()):
            return False
    return True


def scale_draws(leaves: Sequence[Tensor]) -> int:
    """How often to check with random weights: in half precision two weights may be the same to rounding, by chance."""
    return 3 if any(torch.finfo(leaf.dtype).bits < 32 for leaf in leaves) else 1


def _signed(gradient: PerSample, sign: Tensor | None, here: slice) -> PerSample | None:
    if sign is None:
        return None
    weights = sign[here]
    return with_cotangents(gradient, lambda g: g * weights.view(*weights.shape, *(1,) * (g.dim() - 2)))


def expose_output(output: Any, points: list[Tensor], dims: Dimensions | None, *, detach: bool) -> Any:
    """The model's output, made of new points with samples in dim 0, which are entered in ``points``.

    Args:
        output: tensors in any structure; those that are differentiable are replaced.
        points: receives the points: with ``detach`` leaves of equal value, else views of the tensors.
        dims: where a tensor's samples are; None makes the whole output one sample, points of shape ``(1, numel)``.
        detach: cut the points off the model.
    """

    def replace(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        dim = None if dims is None else dims(tensor)
        point = tensor.reshape(1, -1) if dim is None else tensor.movedim(dim, 0)
        points.append(point.detach().clone().requires_grad_(True) if detach else point)
        return points[-1].view(tensor.shape) if dim is None else points[-1].movedim(0, dim)

    return map_tensors(replace, output)
