"""Heads: layers whose output is the model's, and their part of Jᵀ H J without a column.

Where z = f, perhaps with other dimensions in each place, and outputs at different positions do not interact, the
squares of all columns add up to H's own diagonal: ``Σ_n Σ_p H_n[(p, o), (p, o)] a[n, p, i]²``, one contraction for as
many columns as the model has outputs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.vjp import chunks, stacked_vjp
from ..errors import AttributionError
from ..layers.contraction import contract
from ..layers.layout import DIM_ZERO
from ..layers.patches import Patches
from ..layers.per_sample import Outer, chunk_elements
from .output_hessian import as_samples
from .recorded_layer import RecordedLayer
from .roots import Root

#: Outputs of one sample up to which a number for each is exact in single precision.
MAX_NUMBERED = 1 << 24

#: Its multiples have fractional parts that are all unlike.
GOLDEN = 5**0.5 / 2 - 0.5

#: Dimensions of an output up to which it may be z with these in other places.
MAX_DIMS = 5


class Head(NamedTuple):
    """A layer whose z is an output of the model."""

    which: int  #: of the outputs
    order: tuple[int, ...]  #: for each dimension of z, that of the output

    def in_z(self, values: Tensor) -> Tensor:
        """Values of the output's shape, in that of z."""
        return values.permute(self.order)

    def in_output(self, values: Tensor) -> Tensor:
        """Values of the shape of z, in the output's."""
        return values.permute([self.order.index(d) for d in range(len(self.order))])


def head_outputs(
    model_outputs: Sequence[Tensor], layers: Sequence[RecordedLayer], generator: torch.Generator
) -> dict[str, Head]:
    """The layers whose output z is one of the model's, by name, and how.

    The Jacobian from z to the outputs must be the identity, or put dimensions in other places: a random cotangent on
    the outputs must come back bit for bit, the one on that output alone. Anything else does so with probability zero.
    """
    ruled = [z for z in layers if z.layer.rule is not None and len(z.leaves) == 1 and z.leaves[0].numel()]
    candidates = [z for z in ruled if any(any(_orders(f.shape, z.leaves[0].shape)) for f in model_outputs)]
    if not candidates:
        return {}
    where = generator.device
    random = [torch.randn(f.shape, generator=generator, dtype=torch.float32, device=where).to(f) for f in model_outputs]
    found = stacked_vjp(model_outputs, [z.leaves[0] for z in candidates], [r[None] for r in random])
    heads: dict[str, Head] = {}
    for z, back in zip(candidates, found, strict=True):
        for index, r in enumerate(random):
            orders = _orders(r.shape, back[0].shape)
            order = next((order for order in orders if torch.equal(back[0], r.permute(order))), None)
            if order is not None:
                heads[z.layer.name] = Head(index, order)
    return heads


def _orders(output: Sequence[int], z: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """How dimensions of an output may be those of z, where both have samples in dim 0."""
    if len(output) != len(z) or len(z) > MAX_DIMS or sorted(output) != sorted(z):
        return
    for rest in permutations(range(1, len(z))):
        if all(output[d] == size for d, size in zip((0, *rest), z, strict=True)):
            yield (0, *rest)


def known_heads(
    model_outputs: Sequence[Tensor], layers: Sequence[RecordedLayer], heads: Mapping[str, Head], root: Root
) -> dict[str, Head]:
    """Those heads to which :func:`contract_head` applies: the diagonal is known, and positions do not interact."""
    if root.diagonal is None or root.blocks is None:
        return {}
    blocks = root.blocks.split([as_samples(f).shape[1] for f in model_outputs])
    known = {}
    for z in layers:
        head = heads.get(z.layer.name)
        if head is not None and _applies(z, blocks[head.which], model_outputs[head.which].shape, head):
            known[z.layer.name] = head
    return known


def contract_head(
    z: RecordedLayer, model_outputs: Sequence[Tensor], head: Head, root: Root, alpha: float = 1.0
) -> list[Tensor]:
    """α Σ_k contract(u_k, v_k) by parameter, of one of :func:`known_heads`; the root is that of all outputs."""
    assert root.diagonal is not None
    sizes = [as_samples(f).shape[1] for f in model_outputs]
    of_output = root.diagonal.split(sizes, 1)[head.which].reshape(model_outputs[head.which].shape)
    diagonal = head.in_z(of_output)[None]
    z.layouts = [DIM_ZERO]
    u = z.gradients([diagonal.abs().sqrt()])
    signs = z.gradients([diagonal.sign()]) if bool((diagonal < 0).any()) else None
    found = []
    for name, p in z.layer.parameters.items():
        own, sign = u[name], None if signs is None else signs[name]
        assert isinstance(own, Outer)
        signed = own.g[0] * sign.g[0] if isinstance(sign, Outer) else own.g[0]
        found.append(_by_position(own.a, own.g[0], signed, p.numel(), alpha))
    return found


def _by_position(a: Tensor | Patches | None, g: Tensor, signed: Tensor, numel: int, alpha: float) -> Tensor:
    """α Σ contract, every position of every sample a sample of its own; a few samples' patches at a time."""

    def split(factor: Tensor) -> Tensor:  # (N, G, P, k) -> (N P, G, 1, k)
        return factor.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    size = len(g) if a is None else max(1, chunk_elements(g.device) // max(1, math.prod(a.shape[1:])))
    total = g.new_zeros(numel)
    for n in chunks(len(g), size):
        here = slice(n.start, n.stop)
        inputs = None if a is None else split(a[here])
        parts = Outer(inputs, split(g[here])), Outer(inputs, split(signed[here]))
        contract(*parts, numel=numel, out=total, alpha=alpha)
    return total


def _applies(z: RecordedLayer, blocks: Tensor, shape: torch.Size, head: Head) -> bool:
    """Whether the rule multiplies inputs with cotangents, and every block of outputs lies at one position of it."""
    if len(blocks) > MAX_NUMBERED:
        return False
    z.layouts = [DIM_ZERO]

    def factors(values: Tensor) -> list[Tensor | None]:
        """Of one sample, what the rule makes of a cotangent for each parameter."""
        found = z.gradients([head.in_z(values.view(1, *shape[1:]).expand(shape))[None]]).values()
        return [part.g[0, 0] if isinstance(part, Outer) else None for part in found]

    try:
        numbered = factors(blocks.float())
    except AttributionError:  # not a shape that the rule is for
        return False
    if not all(g is not None and _apart(g) for g in numbered):
        return False
    unlike = (1 + torch.arange(len(blocks), dtype=torch.float64, device=blocks.device) * GOLDEN % 1).to(z.leaves[0])
    return all(g is not None and _rearranged(unlike, g) for g in factors(unlike))


def _rearranged(values: Tensor, others: Tensor) -> bool:
    """Whether they are the same numbers in another order: mixtures would have other sums of powers."""
    values, others = values.double(), others.double()
    sums = [(values.pow(k).sum(), others.pow(k).sum()) for k in (2, 4)]
    return all(bool((a - b).abs() <= 1e-10 * a) for a, b in sums)


def _apart(numbers: Tensor) -> bool:
    """Whether no number (G, P, out), but -1, stands at two positions."""
    count = numbers.shape[1]
    if count == 1:
        return True
    numbers = numbers.long()
    positions = torch.arange(count, device=numbers.device)[:, None].expand_as(numbers)
    inside = numbers >= 0
    first = torch.full((int(numbers.max()) + 2,), count, device=numbers.device)
    last = torch.full_like(first, -1)
    first.scatter_reduce_(0, numbers[inside], positions[inside], "amin")
    last.scatter_reduce_(0, numbers[inside], positions[inside], "amax")
    return bool((last <= first).all())
